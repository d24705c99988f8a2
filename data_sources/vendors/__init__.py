"""All sources of bars. Adding one: docs/adding_a_source.md."""

from data_sources import simulated
from data_sources.sources import Source
from data_sources.vendors import binance, files, polygon, yahoo

# By name; of several sources with bars of one symbol the earlier is preferred.
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        files.SOURCE,
        polygon.SOURCE,
        binance.SOURCE,
        binance.FUTURES,
        yahoo.SOURCE,
        simulated.SOURCE,
    )
}
_GROUPS = [group for source in SOURCES.values() for group in source.groups if group.setting]
ADVISERS = {group.setting: group.advise for group in _GROUPS}  # on the spelling of symbols
SYMBOL_SETTINGS = tuple(dict.fromkeys(group.setting for group in _GROUPS))  # the settings that list symbols
# Those among which a rule such as top:500 may be: some source keeps all of their symbols in one dataset.
RULE_SETTINGS = tuple(dict.fromkeys(group.setting for group in _GROUPS if group.dataset))
