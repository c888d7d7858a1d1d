"""The cost of serving: per request, per day, and compared with an API that charges per token."""

from __future__ import annotations

import math

SECONDS_PER_DAY = 86_400


def per_thousand(price_per_hour: float, latency: float, batch: int) -> float:
    """Return the price of a thousand requests on a device that is always busy.

    It is ``price per second x latency / batch x 1000``.

    Args:
        price_per_hour: The price of the device.
        latency: Seconds per batch.
        batch: Requests per batch.

    Example:
        >>> round(per_thousand(price_per_hour=2.0, latency=0.05, batch=32), 5)
        0.00087
    """
    return 1000 * price_per_hour / 3600 * latency / batch


def per_day(price_per_hour: float, latency: float, batch: int, requests: float) -> tuple[int, float]:
    """Return the number of devices that serve a day's requests, evenly spread, and their price for the day.

    Example:
        >>> per_day(price_per_hour=2.0, latency=0.05, batch=32, requests=500_000)
        (1, 48.0)
    """
    busy = requests / batch * latency
    devices = max(1, math.ceil(round(busy / SECONDS_PER_DAY, 9)))  # a full day is not more than one
    return devices, devices * price_per_hour * 24


def api_per_day(requests: float, tokens: float, price_per_thousand_tokens: float) -> float:
    """Return the price of a day's requests at an API that charges per token.

    Example:
        >>> api_per_day(requests=500_000, tokens=500, price_per_thousand_tokens=0.03)
        7500.0
    """
    return requests * tokens / 1000 * price_per_thousand_tokens


def break_even(
    price_per_hour: float, latency: float, batch: int, tokens: float, price_per_thousand_tokens: float
) -> float | None:
    """Return the requests per day above which your own device is cheaper than the API; None if it never is.

    Example:
        >>> break_even(2.0, latency=0.05, batch=32, tokens=500, price_per_thousand_tokens=0.03)
        3200.0
        >>> break_even(2.0, latency=60.0, batch=1, tokens=500, price_per_thousand_tokens=0.03)
    """
    requests = price_per_hour * 24 / (tokens / 1000 * price_per_thousand_tokens)
    return requests if requests <= SECONDS_PER_DAY / latency * batch else None
