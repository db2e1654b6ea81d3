"""What each mechanism is: the one place that pages, command line, advice and documents read. No torch.

>>> MECHANISMS["sliding_window"].cache_bytes(
...     heads=32, kv_heads=8, head_dim=128, tokens=32768, layers=32, bytes_per_element=2, window_size=4096)
536870912
"""

from collections.abc import Mapping
from typing import Any

from attnlab_kernels.mechanism_record import Mechanism, Parameter
from attnlab_kernels.records import cached, efficient, specialized, standard

__all__ = ["MECHANISMS", "Mechanism", "Parameter", "validate_parameters"]

MECHANISMS: dict[str, Mechanism] = {
    record.id: record
    for record in (*standard.RECORDS, *efficient.RECORDS, *cached.RECORDS, *specialized.RECORDS)
}


def validate_parameters(mechanism: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every parameter of a mechanism with its value or its default.

    Raises:
        ValueError: an unknown mechanism or parameter, or a value outside its range; the text names the
            argument, the rule, the value and the choices.
    """
    if mechanism not in MECHANISMS:
        raise ValueError(f"mechanism must be one of {', '.join(MECHANISMS)}; got {mechanism!r}")
    known = {parameter.name: parameter for parameter in MECHANISMS[mechanism].parameters}
    for name in given:
        if name not in known:
            choices = ", ".join(known) or "none, it has no parameters"
            raise ValueError(f"{mechanism} has no parameter {name!r}; choices: {choices}")
    return {name: parameter.check(given.get(name, parameter.default)) for name, parameter in known.items()}
