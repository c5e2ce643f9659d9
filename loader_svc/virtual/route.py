"""The ways that calls take through the one pipeline, each found out once.

What the pipeline yields depends on nothing but a call's specification and the answers to the steps before. So the first
call to give a row of answers asks the pipeline what comes next, and all later ones find it here: a step costs them a
look-up instead of a generator's turn, and no step or ending is made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from loader_svc.pipeline import load_module
from loader_svc.steps import CallSpec, Ending, Free, Step
from loader_svc.virtual.areas import Freed, Held

MAX_ANSWERS: Final = 256
"""Answers to one step that are remembered: a failure may name a value that no other one will."""


class Facts(Protocol):
    """What is the same for all calls that load one file in one way."""

    spec: CallSpec

    def known(self, step: Step) -> tuple[bool, Any, int]:
        """Say of a step whether its answer is known before it is carried out, the answer, and what it takes, in ns."""

    def held_after(self, held: Held, step: Step | None, answer: Any) -> Held:
        """Return what a call holds that held something before a step that came to an answer; frees aside."""

    def freed(self, held: Held, what: str) -> tuple[Freed, Held]:
        """Return what a call frees by ``Free(what)``, and what it holds then."""


class Node:
    """One step of a way, and what comes after it by the answer."""

    __slots__ = (
        "_answers",
        "_facts",
        "carry_out",
        "cost_ns",
        "ending",
        "freed",
        "held",
        "is_end",
        "is_exact",
        "latest",
        "on_latest",
        "others",
        "step",
        "tag",
    )

    def __init__(self, facts: Facts, answers: tuple[Any, ...], step: Step | None, cost_ns: int, held: Held) -> None:
        self._facts = facts
        self._answers = answers
        """The answers to all steps before this one."""
        self.others: dict[Any, Node] = {}
        """What comes after each answer, as far as calls have given it."""
        self.latest: Any = self
        """The answer that was given the last time: this very object, mostly, will be given the next time, too."""
        self.on_latest = self
        """What comes after it."""
        self.step = step
        """None at the very beginning, which None is the answer to, and at the end."""
        self.cost_ns = cost_ns
        """What the steps before this one took that need not be carried out."""
        self.held = held
        """What a call holds here, once that is freed which is to be freed before this step."""
        self.freed: Freed | None = None
        """What is to be freed before this step, if anything: what ``Free`` in the pipeline comes to."""
        self.ending: Ending | None = None
        """How the call ended; None unless this is the end."""
        self.carry_out: Callable[[Any], Any] | None = None
        """For whoever follows the ways: how the step is carried out; None where nobody has come yet."""
        self.is_exact = False
        """For whoever follows the ways: whether the time that is owed must have passed before."""
        self.is_end = False
        """For whoever follows the ways: whether nothing is left to be done but to end."""
        self.tag: Any = None
        """For whoever follows the ways: what else belongs to this node."""

    @classmethod
    def first(cls, facts: Facts) -> Node:
        """Return the beginning of all ways of calls with one specification."""
        return cls(facts, (), None, 0, Held())

    def after(self, answer: Any) -> Node:
        """Return what comes after an answer."""
        node = self.others.get(answer)
        if node is None:
            node = self._grow(answer)
        self.latest, self.on_latest = answer, node
        return node

    def _grow(self, answer: Any) -> Node:
        facts = self._facts
        pipeline = load_module(facts.spec)
        answers = (*self._answers, answer)
        held = facts.held_after(self.held, self.step, answer)
        cost_ns = 0
        freed: Freed | None = None
        try:
            for each in answers:
                step = pipeline.send(each)
            while True:
                is_known, known_answer, known_ns = facts.known(step)
                if isinstance(step, Free):
                    freed, held = facts.freed(held, step.what)
                if not is_known:
                    break
                answers = (*answers, known_answer)
                cost_ns += known_ns
                step = pipeline.send(known_answer)
            node = Node(facts, answers, step, cost_ns, held)
        except StopIteration as end:
            node = Node(facts, answers, None, cost_ns, held)
            node.ending = end.value
        if freed is not None and freed.size_bytes:
            node.freed = freed
        if len(self.others) < MAX_ANSWERS:
            self.others[answer] = node
        return node
