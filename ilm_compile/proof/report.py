"""What a verification found, for people (`str`) and for machines (`to_json`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from ilm_compile.errors import VerificationError


@dataclass(frozen=True, slots=True)
class Check:
    """One layer of the proof: its name, whether it held, and what it saw."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `ilm_compile.verify`.

    Errors are relative, in float64; NaN where a check did not get that far. `failures` says for
    each failed check what differs, since which pass and from which node on; `warnings`, what was
    not proven as far as the rest.
    """

    title: str
    checks: list[Check] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    max_loss_error: float = float("nan")
    max_grad_error: float = float("nan")
    max_weight_error: float = float("nan")

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return not self.failures

    @property
    def seconds(self) -> float:
        """The time all checks took."""
        return sum(check.seconds for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raise `VerificationError` with the whole report unless every check held."""
        if not self.ok:
            raise VerificationError(str(self))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps({**asdict(self), "ok": self.ok, "seconds": self.seconds}, indent=2)

    def __str__(self) -> str:
        lines = [self.title]
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            mark = "ok    " if check.ok else "FAILED"
            name = check.name.ljust(width)
            lines.append(f"  {mark}  {name}  {check.seconds:6.2f} s  {check.detail}")
        lines += [f"  warning  {text}" for text in self.warnings]
        lines += ["", *self.failures] if self.failures else []
        verdict = "equal to the single-device model" if self.ok else "NOT equal: do not launch"
        return "\n".join([*lines, f"verdict: {verdict} ({self.seconds:.1f} s)"])
