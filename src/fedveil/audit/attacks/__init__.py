"""What can be made of released bytes: one attack a file, each usable alone.

Every attack knows all bytes of its coalition, the architecture, the scheme's source, the public
base and the attacker's own data. Only the federation secret is withheld. Steps combine: collect
(`union`, `average`, `intersect`, `extrapolate`), fill what is missing (`fill`), go on in the
direction that was shown (`amplify`), and train on (`heal`, `sparing`, `between`, `distil`,
`federate`).
"""

from fedveil.audit.attacks.averaging import average, intersect
from fedveil.audit.attacks.difference import FACTORS, amplify
from fedveil.audit.attacks.distillation import distil
from fedveil.audit.attacks.extrapolation import extrapolate
from fedveil.audit.attacks.federating import federate
from fedveil.audit.attacks.filling import fill
from fedveil.audit.attacks.forging import can_forge
from fedveil.audit.attacks.healing import Healing, heal
from fedveil.audit.attacks.inference import UpdateGuess, infer_updates
from fedveil.audit.attacks.loot import Loot
from fedveil.audit.attacks.souping import SHARES, between
from fedveil.audit.attacks.sparing import lacks_classes, sparing
from fedveil.audit.attacks.union import union

__all__ = [
    "FACTORS",
    "SHARES",
    "Healing",
    "Loot",
    "UpdateGuess",
    "amplify",
    "average",
    "between",
    "can_forge",
    "distil",
    "extrapolate",
    "federate",
    "fill",
    "heal",
    "infer_updates",
    "intersect",
    "lacks_classes",
    "sparing",
    "union",
]
