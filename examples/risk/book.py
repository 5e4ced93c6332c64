"""A book of options on correlated stocks, valued with the Black-Scholes formula in NumPy.

Uses only elementwise operations. BLAS is avoided because the bits of its results depend on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Stock:
    """A stock: its price today, and its drift and volatility per year."""

    price: float
    drift: float
    volatility: float


@dataclass(frozen=True)
class Position:
    """A position of `quantity` European options on stock number `stock`, which expire in `years` years.

    strike 0: the position holds the stock itself.
    """

    stock: int
    quantity: float
    strike: float = 0.0
    years: float = 0.0
    is_call: bool = True


@dataclass(frozen=True)
class Book:
    """Positions, and the market data of their stocks. rate: the risk-free interest rate per year."""

    stocks: tuple[Stock, ...]
    correlation: tuple[tuple[float, ...], ...]
    positions: tuple[Position, ...]
    rate: float = 0.02

    def value(self, prices: list[Array], after_years: float) -> Array:
        """Return the value of the book after `after_years` on each path: [paths].

        prices[i]: the prices of stock i, [paths] fp64.
        """
        total = np.zeros_like(prices[0])
        for position in self.positions:
            price = prices[position.stock]
            if position.strike:
                volatility = self.stocks[position.stock].volatility
                price = option_price(price, position, volatility, self.rate, position.years - after_years)
            total += position.quantity * price
        return total

    def value_today(self) -> float:
        """Return the value of the book at today's prices."""
        return float(self.value([np.array([stock.price]) for stock in self.stocks], 0.0)[0])


def option_price(price: Array, option: Position, volatility: float, rate: float, years: float) -> Array:
    """Return the Black-Scholes price of one European option for each price of its stock: [paths]."""
    spread = volatility * np.sqrt(years)
    discounted = option.strike * np.exp(-rate * years)
    d1 = np.log(price / discounted) / spread + spread / 2
    call = price * normal_cdf(d1) - discounted * normal_cdf(d1 - spread)
    return call if option.is_call else call - price + discounted


def normal_cdf(x: Array) -> Array:
    """Return the standard normal distribution function in double precision (Hart's rational function, from West)."""
    size = np.minimum(np.abs(x), 37.0)
    density = np.exp(-size * size / 2)
    above = 3.52624965998911e-02 * size + 0.700383064443688
    for factor in (6.37396220353165, 33.912866078383, 112.079291497871, 221.213596169931, 220.206867912376):
        above = above * size + factor
    below = 8.83883476483184e-02 * size + 1.75566716318264
    for factor in (16.064177579207, 86.7807322029461, 296.564248779674, 637.333633378831, 793.826512519948):
        below = below * size + factor
    below = below * size + 440.413735824752
    far = size + 0.65
    for step in (4.0, 3.0, 2.0, 1.0):
        far = size + step / far
    tail = np.where(size < 7.07106781186547, density * above / below, density / far / 2.506628274631)
    return np.where(x > 0, 1 - tail, tail)


EXAMPLE = Book(
    stocks=(Stock(100.0, 0.06, 0.22), Stock(48.0, 0.08, 0.35), Stock(210.0, 0.05, 0.18), Stock(75.0, 0.07, 0.28)),
    correlation=(
        (1.0, 0.55, 0.60, 0.35),
        (0.55, 1.0, 0.45, 0.30),
        (0.60, 0.45, 1.0, 0.40),
        (0.35, 0.30, 0.40, 1.0),
    ),
    positions=(
        Position(0, 1_000),
        Position(0, -1_500, strike=105.0, years=0.25),
        Position(0, 800, strike=92.0, years=0.5, is_call=False),
        Position(1, -2_000, strike=42.0, years=0.25, is_call=False),
        Position(1, 1_200, strike=50.0, years=1.0),
        Position(2, -600, strike=190.0, years=0.5, is_call=False),
        Position(2, 400, strike=220.0, years=0.5),
        Position(3, -900, strike=75.0, years=0.25),
        Position(3, -900, strike=75.0, years=0.25, is_call=False),
    ),
)
"""Stocks, covered calls, protective and short puts, and a short straddle: it loses in both directions."""
