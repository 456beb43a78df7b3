"""Why a parameter lies as it does: what every other placement would have cost, and where."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from ilm_compile.errors import PlanError
from ilm_compile.program.collectives import TRANSITIONS
from ilm_compile.program.dump import target_name
from ilm_compile.program.placement import Placement
from ilm_compile.sharding.integer_program import TOLERANCE, Answer
from ilm_compile.sharding.solver import Solution


@dataclass(frozen=True)
class Reasons:
    """Answers questions about a solution by solving again with the question's choice forced."""

    solution: Solution

    def explain(self, name: str) -> str:
        """Return what parameter `name` could have been and what that would have cost.

        Times are predicted seconds of the whole model for one micro-batch, forward and backward.
        Raises `PlanError` for a name that is no parameter of the graph.
        """
        search = self.solution.search
        nodes = {str(n.target): n for n in self.solution.placements if n.op == "get_attr"}
        if name not in nodes:
            near = get_close_matches(name, nodes, n=3, cutoff=0.3)
            raise PlanError(f"explain: no parameter {name!r} in the graph; did you mean {near}?")
        cluster = search.clusters[nodes[name]]
        alike = len(search.members[cluster]) - 1
        lines = [f"{name} over {search.size} ranks{f', and {alike} more like it' if alike else ''}"]
        for index, option in enumerate(search.choices[cluster]):
            chosen = option.output == self.solution.placements[nodes[name]]
            column = search.first[cluster] + index
            answer = self.solution.answer if chosen else search.problem.solve(chosen=column)
            lines.append(self._line(option.output, answer, chosen))
        if len(search.choices[cluster]) == 1:
            lines.append("  nothing else is legal: " + self._users(name))
        return "\n".join(lines) + "\n"

    def _line(self, placement: Placement, answer: Answer | None, chosen: bool) -> str:
        start = f"  {placement!s:24}"
        if answer is None:
            return f"{start}impossible: some other op would have no legal strategy left"
        start += f"{answer.seconds * 1e3:9.3f} ms  "
        if chosen:
            return start + "chosen"
        repeated = answer.repeated - self.solution.answer.repeated
        extra = answer.seconds - self.solution.answer.seconds
        because = self._moves(answer) or "the collectives are the same; it computes more"
        if repeated > TOLERANCE:
            why = f"every rank would repeat {repeated:.1%} of weights and FLOPs"
            return f"{start}{why}, and time {extra * 1e3:+.3f} ms"
        return f"{start}{extra * 1e3:+.3f} ms: {because}"

    def _moves(self, answer: Answer) -> str:
        """Return the moves that `answer` makes and the solution does not, the longest first."""
        search = self.solution.search
        new = [
            move
            for column, move in search.moves.items()
            if answer.values[column] > 0.5 > self.solution.answer.values[column]
        ]
        new.sort(key=lambda move: -move.seconds)
        words = [
            f"{TRANSITIONS[m.source.kind, m.target.kind][0]} of {m.node.name} "
            f"{m.source} -> {m.target}, {m.seconds * 1e3:.3f} ms"
            for m in new[:3]
        ]
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        return "; ".join(words) + more

    def _users(self, name: str) -> str:
        node = next(n for n in self.solution.placements if str(n.target) == name)
        users = (f"{target_name(user)} ({user.name})" for user in node.users)
        return "it is used by " + ", ".join(users)
