"""A simulated thermal plant: die -> sink -> ambient, in integers.

Rules: the two-node RC network of every heat-sink data sheet, stepped by explicit Euler at ``STEP_US``, which is a twentieth
of the shortest time constant that a ``Profile`` may have; temperatures are whole µ°C, power whole mW, so that the same history
gives the same temperature on any machine.  The state moves only forward, and only when somebody asks.
"""

from __future__ import annotations

from board_support.profile import Profile

STEP_US = 50_000
SETTLED_TIME_CONSTANTS = 12
"""After this many time constants at one power less than 1e-5 of a temperature difference is left."""


class ThermalPlant:
    """The heat of one machine since ``start_us``, when it stood at ambient temperature plus its idle power."""

    def __init__(self, profile: Profile, start_us: int) -> None:
        self._profile = profile
        self.ambient_mdegc = profile.ambient_mdegc
        """Of the air around the sink; it may change."""
        self.now_us = start_us
        self._step_end_us = start_us + STEP_US
        self._heat_nj = 0
        self._settle(profile.idle_mw)

    @property
    def temperature_mdegc(self) -> int:
        """Of the die."""
        return self._die_udegc // 1000

    @property
    def sink_mdegc(self) -> int:
        return self._sink_udegc // 1000

    def advance(self, until_us: int, power_mw: int) -> None:
        """Dissipate ``power_mw`` from the plant's time to ``until_us``; a time that has passed changes nothing."""
        if until_us - self.now_us > self._settling_us():
            self._settle(power_mw)
            self.now_us, self._step_end_us, self._heat_nj = until_us, until_us + STEP_US, 0
        while self.now_us < until_us:
            next_us = min(until_us, self._step_end_us)
            self._heat_nj += power_mw * (next_us - self.now_us)
            self.now_us = next_us
            if next_us == self._step_end_us:
                self._step()

    def _step(self) -> None:
        """One Euler step. mW * µs = nJ; nJ / (mJ/K) = µK; µK / (mK/W) = mW."""
        profile = self._profile
        to_sink_mw = (self._die_udegc - self._sink_udegc) // profile.die_r_mk_per_w
        to_ambient_mw = (self._sink_udegc - self.ambient_mdegc * 1000) // profile.sink_r_mk_per_w
        self._die_udegc += (self._heat_nj - to_sink_mw * STEP_US) // profile.die_c_mj_per_k
        self._sink_udegc += (to_sink_mw - to_ambient_mw) * STEP_US // profile.sink_c_mj_per_k
        self._heat_nj = 0
        self._step_end_us += STEP_US

    def _settle(self, power_mw: int) -> None:
        """Where a constant power leads in the end: the rise over each resistance is P * R."""
        profile = self._profile
        self._sink_udegc = self.ambient_mdegc * 1000 + power_mw * profile.sink_r_mk_per_w
        self._die_udegc = self._sink_udegc + power_mw * profile.die_r_mk_per_w

    def _settling_us(self) -> int:
        """R * C in mK/W * mJ/K is µs."""
        profile = self._profile
        die_us, sink_us = profile.die_r_mk_per_w * profile.die_c_mj_per_k, profile.sink_r_mk_per_w * profile.sink_c_mj_per_k
        between_us = profile.sink_r_mk_per_w * profile.die_c_mj_per_k
        return SETTLED_TIME_CONSTANTS * (die_us + sink_us + between_us)
