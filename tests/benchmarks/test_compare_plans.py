"""Plans compared: what a rank measures, what is made of it, and the table and pictures."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.common import launch
from benchmarks.compare_plans import PLANS, compare_all, main, show
from benchmarks.comparison import (
    Comparison,
    expected_bubble,
    measured_bubble,
    median_error,
    predict,
    regret,
    summary,
)
from benchmarks.plan_run import RankRun, Row, Settings, run_plain, run_plan
from benchmarks.plots import plot_comparison, plot_timelines, rank_words
from ilm_compile.cost import HARDWARE
from ilm_compile.program.plan import Plan
from tests.support.world import World

SETTINGS = Settings(overrides={"num_layers": 2}, rows=4, seq_len=8, steps=1)


def run_plan_on(rank: int, row: Row) -> RankRun:
    return run_plan(SETTINGS, row)


def compare_in(world: World, fields: dict[str, object]) -> Comparison:
    row = Row("own plan", fields)
    return summary(row, SETTINGS, run_plain(SETTINGS, 2), world.run(run_plan_on, row))


def rank_and_world_size() -> tuple[int, int]:
    from torch import distributed as dist

    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


@pytest.mark.parametrize(
    "fields",
    [{"tp": 2, "num_microbatches": 2}, {"pp": 2, "num_microbatches": 2}, {"dp": 2, "zero": 3}],
    ids=["tp2", "pp2", "dp2"],
)
def test_a_plan_trains_as_plain_pytorch_does(world2: World, fields: dict[str, object]) -> None:
    found = compare_in(world2, fields)
    assert found.loss_error < 1e-5
    assert found.step_time_s > 0
    assert found.tokens_per_second == pytest.approx(4 * 8 / found.step_time_s)
    assert 0 <= found.bubble < 1
    assert set(found.ranks[0].losses) == set(found.ranks[1].losses)


def test_a_sharded_plan_needs_less_memory_than_plain_pytorch(world2: World) -> None:
    plain = run_plain(SETTINGS, 2)
    assert compare_in(world2, {"tp": 2, "num_microbatches": 2}).peak_bytes < plain.peak_bytes


def test_what_two_stages_send_is_their_boundary(world2: World) -> None:
    found = compare_in(world2, {"pp": 2, "num_microbatches": 2})
    activations = 4 * 8 * 64 * 4  # rows, tokens, hidden size, bytes
    assert [rank.sent_bytes["p2p"] for rank in found.ranks] == [activations, activations]


def test_processes_are_started_with_their_rank() -> None:
    assert launch(rank_and_world_size, 2) == [(0, 2), (1, 2)]


@pytest.mark.parametrize("num_microbatches", [4, 8])
def test_the_expected_bubble_of_1f1b_follows_the_formula(num_microbatches: int) -> None:
    # (pp - 1) / (m + pp - 1): Narayanan et al., arXiv:2104.04473, section 2.2
    plan = Plan(pp=4, num_microbatches=num_microbatches)
    assert expected_bubble(plan) == pytest.approx(3 / (num_microbatches + 3))


def test_the_measured_bubble_is_what_is_no_compute() -> None:
    first = [("0F0", 0.0, 2.0), ("wait 0B0", 2.0, 6.0), ("0B0", 6.0, 8.0)]
    second = [("1RECV_F0", 0.0, 2.0), ("1F0", 2.0, 4.0), ("1B0", 4.0, 6.0)]
    assert measured_bubble([[first], [second]]) == pytest.approx(1 - 8 / 16)


def test_without_a_timeline_there_is_no_bubble() -> None:
    assert measured_bubble([[], []]) == 0


@pytest.mark.parametrize("name", PLANS)
def test_the_plans_offered_for_copying_are_valid(name: str) -> None:
    row = Row(name, PLANS[name])
    assert row.num_processes in (1, 2, 4)
    assert 16 % row.num_slices == 0


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SystemExit, match="multiple of its 3 micro-batches, got 4"):
        compare_all([Row("odd", {"num_microbatches": 3})], SETTINGS, Console())


def test_table_and_pictures(tmp_path: Path) -> None:
    timeline = [("0F0", 0.0, 1.0), ("0B0", 1.0, 3.0)]
    run = RankRun(
        step_times_s=[0.5],
        losses=[2.0],
        sent_bytes={"p2p": 2**20},
        peak_bytes=2**21,
        timelines=[timeline],
    )
    row = Row("mine", {"pp": 2})
    comparisons = [summary(row, SETTINGS, run, [run, run])]
    comparisons = [
        replace(comparisons[0], predicted_s=0.45),
        summary(row, SETTINGS, run, [run, run]),
    ]
    console = Console(record=True, width=140)
    show(comparisons, SETTINGS, console)
    plot_comparison(comparisons, tmp_path / "comparison.png")
    plot_timelines(comparisons, tmp_path / "timelines.png")
    line = next(line for line in console.export_text().splitlines() if "mine" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == (
        ["mine", "2", "500.0", "450.0", "-10.0%", "64", "1.00", "2.0", "0.0%", "33.3%", "0.0e+00"]
    )
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert (tmp_path / "timelines.png").stat().st_size > 1000


def test_errors_and_regret_are_of_what_was_predicted() -> None:
    def comparison(measured: float, predicted: float | None) -> Comparison:
        run = RankRun(
            step_times_s=[measured], losses=[2.0], sent_bytes={}, peak_bytes=1, timelines=[]
        )
        return replace(summary(Row("x", {}), SETTINGS, run, [run]), predicted_s=predicted)

    found = [
        comparison(1.0, 1.1),
        comparison(2.0, 1.0),
        comparison(4.0, 4.4),
        comparison(0.1, None),
    ]
    assert median_error(found) == pytest.approx(0.1)
    assert regret(found) == pytest.approx(1.0)  # the second was chosen, the first was faster


def test_steps_are_predicted_before_they_are_run() -> None:
    row = Row("two ranks", {"dp": 2, "num_microbatches": 2})
    alone = predict(Row("one", {"num_microbatches": 4}), SETTINGS, HARDWARE["cpu"])
    assert 0 < predict(row, SETTINGS, HARDWARE["cpu"]) != alone


def test_a_row_of_a_picture_tells_rank_place_and_stages() -> None:
    timeline = [("3F0", 0.0, 1.0), ("wait 1F0", 1.0, 1.5), ("1F0", 1.5, 2.0)]
    plan = Plan(tp=2, pp=2, num_microbatches=2)
    assert rank_words(5, 8, plan, timeline) == "rank 5 (pp 1, dp 0, tp 1): stages 1, 3"
    assert rank_words(3, 4, plan, timeline) == "rank 3 (pp 1, tp 1): stages 1, 3"
    words = rank_words(6, 8, Plan(ep=2, cp=2), timeline)
    assert words == "rank 6 (dp 1, ep 1, cp 0): stages 1, 3"


def test_help_says_what_the_columns_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "loss error  largest relative difference" in capsys.readouterr().out
