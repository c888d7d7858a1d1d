"""What every part may use: tables, lazy exports, file writes, devices. Plain functions that know no technique."""
