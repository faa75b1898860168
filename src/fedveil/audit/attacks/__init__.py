"""What can be made of released bytes: one attack a file.

Every attack knows all bytes of its coalition, the architecture, the scheme's source, the public
base and the attackers' own data. Only the federation secret is withheld. Each takes a `Coalition`
and yields what it finds; `register_attack` makes it known, and the audit tries all that are known.
Files of this package are found by themselves.

The steps that they are made of work alone on a run folder: collect (`pool`, `average`,
`reconstruct`, `extrapolate`), fill holes (`impute`), train on (`fine_tune`, `distil`, `federate`),
and go along the line between two models (`interpolate`, `scale_task_vector`).
"""

from importlib import import_module
from pkgutil import iter_modules

from fedveil.audit.attacks.averaging import average
from fedveil.audit.attacks.coalition import Coalition, Simulated, Stolen
from fedveil.audit.attacks.consistent_reconstruction import reconstruct
from fedveil.audit.attacks.distillation import distil
from fedveil.audit.attacks.fine_tuning import FineTuned, fine_tune
from fedveil.audit.attacks.imputation import impute
from fedveil.audit.attacks.one_shot_federation import federate
from fedveil.audit.attacks.partial_model import PartialModel
from fedveil.audit.attacks.pooling import pool
from fedveil.audit.attacks.registry import Attack, attack_names, attacks, register_attack
from fedveil.audit.attacks.restricted_softmax import lacks_classes, restricted
from fedveil.audit.attacks.task_arithmetic import FACTORS, scale_task_vector
from fedveil.audit.attacks.update_inference import infer_updates
from fedveil.audit.attacks.view_simulation import can_simulate
from fedveil.audit.attacks.weight_extrapolation import extrapolate
from fedveil.audit.attacks.weight_interpolation import SHARES, interpolate

__all__ = [
    "FACTORS",
    "SHARES",
    "Attack",
    "Coalition",
    "FineTuned",
    "PartialModel",
    "Simulated",
    "Stolen",
    "attack_names",
    "attacks",
    "average",
    "can_simulate",
    "distil",
    "extrapolate",
    "federate",
    "fine_tune",
    "impute",
    "infer_updates",
    "interpolate",
    "lacks_classes",
    "pool",
    "reconstruct",
    "register_attack",
    "restricted",
    "scale_task_vector",
]

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
