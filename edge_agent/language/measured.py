"""What a language service counts, as figures for ``/metrics`` and for the board's record.

Rules: nothing here blocks; labels come from the configuration and from fixed sets only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_agent.core.chat import Tier
from edge_agent.gateway.talker import Figure

if TYPE_CHECKING:
    from edge_agent.language.service import LanguageService


def figures(service: LanguageService) -> list[Figure]:
    model = (("model", service.card.name),)
    turns, speeds, hot = service.turns, service.store.speeds, service.hot
    settings = service.settings
    found = [
        Figure("turns_live", "turns that are being answered", turns.live(), labels=model),
        Figure("turns_waiting", "turns that wait for room", service.waiting, labels=model),
        Figure("turns_total", "turns that ended, however", service.turns_served, "counter", model),
        Figure("tokens_made_total", "tokens of answers", turns.tokens_made, "counter", model),
        Figure("tokens_computed_total", "tokens of prompts that were computed", turns.tokens_computed, "counter", model),
        Figure("tokens_cached_total", "tokens of prompts whose KV was there", turns.tokens_cached, "counter", model),
        Figure("sessions", "sessions held", len(service.store.names()), labels=model),
        Figure("engine_deaths_total", "engine children that died", service.pump.deaths, "counter", model),
        Figure("prefill_tokens_a_second", "measured; 0 before", speeds.prefill_tok_s, labels=model),
    ]
    in_use = {Tier.HOT: hot.used_bytes, Tier.RAM: service.store.bytes_in_ram, Tier.DISK: service.store.bytes_on_disk}
    allowed = {Tier.HOT: hot.room.size_bytes, Tier.RAM: settings.ram_bytes, Tier.DISK: settings.disk_bytes}
    for tier, size_bytes in in_use.items():
        labels = (*model, ("tier", tier.value))
        found.append(Figure("kv_bytes", "KV that is held", size_bytes, labels=labels))
        found.append(Figure("kv_free_bytes", "room for more", max(0, allowed[tier] - size_bytes), labels=labels))
    for tier in (Tier.RAM, Tier.DISK, Tier.PEER):
        labels = (*model, ("tier", tier.value))
        found.append(Figure("restore_tokens_a_second", "measured; 0 before", speeds.restore_tok_s(tier), labels=labels))
    return found
