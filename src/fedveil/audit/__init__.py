"""What an attacker makes of exactly the bytes that clients were sent.

It assumes an attacker that has all bytes of its coalition, the architecture, the scheme's source
and the public base; only the federation secret is withheld from it.
"""

from fedveil.audit.auditing import audit
from fedveil.audit.checks import check
from fedveil.audit.evidence import Evidence, Kept

__all__ = [
    "Evidence",
    "Kept",
    "audit",
    "check",
]
