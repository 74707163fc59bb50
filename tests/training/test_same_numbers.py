"""The plan decides who computes what and when; it must not decide what comes out."""

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline

from tests.jobs import MODEL, Outcome, change, joined, small_plan, train_job
from wantrain.models import gpt


def assert_same_bits(one: list[Outcome], other: list[Outcome]) -> None:
    assert one[0].losses == other[0].losses
    assert one[0].norms == other[0].norms
    weights, others = (joined(outcomes, lambda outcome: outcome.weights) for outcomes in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
@pytest.mark.parametrize("stages", [2, 4, 6])
def test_any_number_of_stages_gives_the_bits_of_one_process(stages: int, schedule: str) -> None:
    alone = train_job(small_plan(1, 1))
    assert_same_bits(train_job(small_plan(stages, 1, schedule=schedule)), alone)


def test_depth_and_bucket_size_change_no_bit() -> None:
    plan = small_plan(3, 1)
    deep = change(plan, bucket_bytes=100, stages=[stage.model_dump() | {"max_in_flight": 8} for stage in plan.stages])
    assert_same_bits(train_job(deep), train_job(plan))


def test_a_split_backward_changes_no_bit_whatever_waits_and_whoever_else_averages() -> None:
    model = MODEL.model_copy(update={"dropout": 0.2, "tied": True})
    plan = small_plan(3, 2, model=model, schedule="zero_bubble")
    other = small_plan(3, 2, model=model, max_in_flight=(3, 2, 1))
    expected = train_job(other, model=model)
    for postponed, recompute in ((0, False), (1, True), (4, False)):
        stages = [stage.model_dump() | {"max_postponed": postponed} for stage in plan.stages]
        assert_same_bits(train_job(change(plan, stages=stages), model=model, recompute=recompute), expected)


def test_two_replicas_of_two_stages_agree_with_one_process_to_a_rounding() -> None:
    alone, four = train_job(small_plan(1, 1)), train_job(small_plan(2, 2))
    assert four[0].losses == pytest.approx(alone[0].losses, rel=1e-6)
    grads = joined(alone, lambda outcome: outcome.first_grads)
    others = joined(four, lambda outcome: outcome.first_grads)
    for name, grad in grads.items():
        distance = torch.linalg.vector_norm(others[name] - grad) / torch.linalg.vector_norm(grad)
        assert distance <= 1e-6, name


def test_replicas_hold_the_same_bits() -> None:
    plan = small_plan(2, 3, batch_size=12, num_lanes=6)
    outcomes = train_job(plan)
    for rank, outcome in enumerate(outcomes):
        first = outcomes[plan.stage_of(rank)]
        assert outcome.losses == first.losses
        assert all(torch.equal(weight, first.weights[name]) for name, weight in outcome.weights.items())


def test_four_lanes_give_the_same_batches_on_one_two_and_four_replicas() -> None:
    drawn = []
    for replicas in (1, 2, 4):
        plan = small_plan(1, replicas)
        outcomes = train_job(plan, 2)
        drawn.append([sorted(sample for outcome in outcomes for sample in outcome.samples[step]) for step in range(2)])
    assert drawn[0] == drawn[1] == drawn[2]


def test_uneven_shares_of_the_batch_count_by_their_samples() -> None:
    alone = train_job(small_plan(1, 1, batch_size=6, num_lanes=3))
    uneven = train_job(small_plan(2, 2, batch_size=6, num_lanes=3))
    assert uneven[0].losses == pytest.approx(alone[0].losses, rel=1e-6)


def test_a_tied_head_trains_the_same_on_both_ends() -> None:
    model = MODEL.model_copy(update={"tied": True})
    alone = train_job(small_plan(1, 1, model=model), model=model)
    cut = train_job(small_plan(3, 2, model=model, num_lanes=4), model=model)
    assert cut[0].losses == pytest.approx(alone[0].losses, rel=1e-5)
    assert cut[0].norms[0] == pytest.approx(alone[0].norms[0], rel=1e-5)
    ends = joined(cut, lambda outcome: outcome.weights)
    assert torch.equal(ends["0.weight"], ends["5.weight"])


def test_dropout_is_the_samples_own_not_the_plans() -> None:
    model = MODEL.model_copy(update={"dropout": 0.2})
    alone = train_job(small_plan(1, 1, model=model), model=model)
    assert_same_bits(train_job(small_plan(3, 1, model=model), model=model), alone)
    plain = train_job(small_plan(1, 1))
    assert alone[0].losses != plain[0].losses


def test_clipping_holds_the_whole_models_norm() -> None:
    tight = {"clip_norm": 1e-3}
    alone, cut = train_job(small_plan(1, 1), **tight), train_job(small_plan(4, 1), **tight)
    assert_same_bits(cut, alone)
    free = train_job(small_plan(1, 1), clip_norm=None)
    assert free[0].norms[0] == alone[0].norms[0] > 1e-3


def test_recomputed_activations_change_no_bit() -> None:
    model = MODEL.model_copy(update={"dropout": 0.2})  # what is made anew must see the masks of its own samples
    plan = small_plan(2, 1, model=model)
    assert_same_bits(train_job(plan, model=model, recompute=True), train_job(plan, model=model))


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_a_model_may_be_one_module_of_layers(container: type[nn.Module]) -> None:
    plan = small_plan(2, 1)

    def whole() -> nn.Module:
        layers = gpt.build_layers(MODEL, 0, MODEL.num_layers_total, 1)
        return nn.ModuleList(layers) if container is nn.ModuleList else nn.Sequential(*layers)

    assert_same_bits(train_job(plan, layers=whole), train_job(plan))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch.compile looks
def test_compiled_layers_train_as_others() -> None:
    def compiled() -> list[nn.Module]:
        layers = gpt.build_layers(MODEL, 0, MODEL.num_layers_total, 1)
        layers[2].compile(backend="aot_eager")
        return layers

    plan = small_plan(1, 1)
    losses = train_job(plan, layers=compiled)[0].losses
    assert losses == pytest.approx(train_job(plan)[0].losses, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch.export's own
def test_parts_that_torch_export_cut_train_as_the_layers_they_were() -> None:
    def parts() -> list[nn.Module]:
        count = MODEL.num_layers_total
        whole = nn.Sequential(*gpt.build_layers(MODEL, 0, count, 1))
        cuts = {str(layer): SplitPoint.BEGINNING for layer in range(1, count)}
        tokens = torch.zeros(1, MODEL.seq_len, dtype=torch.int64)
        pipe = pipeline(whole, mb_args=(tokens,), split_spec=cuts)
        return [pipe.get_stage_module(index) for index in range(count)]

    plan = small_plan(1, 1)
    assert train_job(plan, layers=parts)[0].losses == train_job(plan)[0].losses
