"""Play placements in virtual time, and choose how deep each runs ahead.

Among depths that are equally fast within 1 % it is the one that needs the least memory, or the deepest where a link is
the bottleneck: a real link is not as steady as the simulator's, and what is in flight makes up for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from wantrain.plan import Plan
from wantrain.profile import ModelProfile
from wantrain.scheduler.cost_model import make_workload, memory_bytes, memory_terms, predict
from wantrain.scheduler.draft import Drafter
from wantrain.scheduler.search import Candidate
from wantrain.scheduler.simulator import step_s
from wantrain.topology import Topology
from wantrain.units import format_bytes
from wantrain.wire import Transport

_REMEDIES = {
    "weights, gradients and the optimizer": "add a worker, or raise num_stages",
    "activations": "lower microbatch_size or max_in_flight, or add a worker",
    "payloads": "lower microbatch_size or max_in_flight, or give a codec with fewer bits",
    "channels": "add memory: long fast links need so much under way",
    "message buffers": "lower 'ram' under [buffers]",
}
"""By what takes most of the memory: what to do about it."""

SAME_WITHIN = 1.01
"""Depths whose step times differ by less count as equal: chosen, below what a measurement tells apart."""

Objective = Callable[[Plan], float]


class Player:
    """Plays plans for one request, and scores them: by their step's seconds, or by an objective."""

    def __init__(
        self, topology: Topology, profile: ModelProfile, drafter: Drafter, objective: Objective | None = None
    ) -> None:
        self.drafter = drafter
        self._topology, self._profile, self.objective = topology, profile, objective

    def seconds(self, plan: Plan) -> float:
        """Return the seconds of a step."""
        return step_s(plan, self._topology, make_workload(plan, self._topology, self._profile))

    def score(self, plan: Plan) -> float:
        """Return what is to be least: the objective of the plan with its prediction, or the step's seconds."""
        return self.seconds(plan) if self.objective is None else self.objective(self.predicted(plan))

    def predicted(self, plan: Plan) -> Plan:
        """Return the plan with its prediction."""
        if plan.prediction is not None:
            return plan
        return plan.model_copy(update={"prediction": predict(plan, self._topology, self._profile)})

    def best_depths(self, candidate: Candidate, is_brief: bool = False) -> tuple[float, Plan] | None:
        """Return a placement's best plan with its score, at the depth chosen as said above; None where none fits.

        Being brief, play only the two deepest that fit; where the backward is split these may be of one depth.
        """
        placement = candidate.placement
        deepest_first = sorted(self.drafter.depths(placement, candidate.limit), key=sum, reverse=True)
        drafts = (plan for depths in deepest_first for plan in self.drafter.plans(placement, depths))
        fitting = (plan for plan in drafts if self.shortage(plan) is None)
        scored = [(self.score(plan), plan) for plan in itertools.islice(fitting, 2 if is_brief else None)]
        if not scored:
            return None
        fastest = min(score for score, _ in scored)
        same = [(score, plan) for score, plan in scored if score <= fastest * SAME_WITHIN]
        return same[0] if len(same) == 1 else self._steadiest(same)

    def _steadiest(self, same: Sequence[tuple[float, Plan]]) -> tuple[float, Plan]:
        """Return the leanest of plans that are equally fast, or the deepest if a link is the bottleneck."""
        by_memory = sorted(same, key=lambda one: max(self._needs(one[1])))
        prediction = self.predicted(by_memory[0][1]).prediction
        assert prediction is not None
        return by_memory[-1 if prediction.bottleneck.startswith("link") else 0]

    def _needs(self, plan: Plan) -> list[int]:
        """Return what each rank needs; it is counted once for ranks of one stage whose links are alike."""
        known: dict[tuple[int, tuple[Transport, ...]], int] = {}
        needs = []
        for rank in range(plan.world_size):
            stage, replica = plan.stage_of(rank), plan.replica_of(rank)
            links = tuple(one.transports[replica] for one in plan.boundaries[max(0, stage - 1) : stage + 1])
            if (stage, links) not in known:
                known[stage, links] = memory_bytes(plan, self._profile, rank)
            needs.append(known[stage, links])
        return needs

    def shortage(self, plan: Plan) -> str | None:
        """Say which worker has too little memory for a plan, and how little, if any; the worst one."""
        lacks = []
        for rank, (name, needs) in enumerate(zip(plan.workers, self._needs(plan), strict=True)):
            has = self._topology.worker(name).memory_bytes
            if needs > has:
                lacks.append((has / needs, rank))
        if not lacks:
            return None
        share, rank = min(lacks)
        terms = memory_terms(plan, self._profile, rank)
        most, needs = max(terms, key=lambda term: terms[term]), sum(terms.values())
        who = f"stage {plan.stage_of(rank)} needs {format_bytes(needs)} on worker '{plan.workers[rank]}'"
        part = f"{format_bytes(terms[most])} of it for {most}"
        return f"{who} (has {format_bytes(round(share * needs))}), {part}; {_REMEDIES[most]}"

    def size_of(self, plan: Plan) -> int:
        """Return how many things happen in a step: actions, payloads and pieces of gradients."""
        replicas = len(plan.replicas)
        buckets = self._profile.parameter_bytes // plan.bucket_bytes + plan.num_stages
        microbatches = sum(replica.num_microbatches for replica in plan.replicas)
        return 4 * plan.num_stages * microbatches + 2 * replicas * (replicas - 1) * buckets
