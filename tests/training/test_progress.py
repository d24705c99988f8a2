"""What a run and a start report about themselves: that costs grow, and what that does to the reward."""

from __future__ import annotations

from training.progress import Summary, TrainingProgress


def test_a_run_in_which_costs_grow_says_so() -> None:
    progress = TrainingProgress()
    growing = "Run 1: epochs 1 to 50; costs grow from zero to full by epoch 26, and the reward falls by them"
    assert progress.describe_run(0.5, 50) == growing
    assert progress.cost_scale(0.5, 50) == 0
    progress.epoch = 25
    assert progress.cost_scale(0.5, 50) == 1
    assert progress.describe_run(0.5, 50) == "Run 1: epochs 26 to 50"
    progress.next_run()
    assert progress.describe_run(0.5, 50) == "Run 2: epochs 1 to 50"


def test_the_summary_compares_rewards_of_unlike_costs_only_with_a_word() -> None:
    first, later = Summary(0), Summary(0)
    for epoch in range(20):
        first.count(1.0 - epoch / 20, min(1.0, epoch / 10))
        later.count(1.0, 1.0)
    reward = first.lines(TrainingProgress(), "none")[1]
    assert reward.startswith("Reward: +0.975 bp/bar over the first 2 epochs, +0.075 over the last 2")
    assert reward.endswith("; costs grew from 0% to 100% of their full size meanwhile")
    assert "costs" not in "".join(later.lines(TrainingProgress(), "none"))


def test_one_epoch_is_one() -> None:
    short = Summary(0)
    short.count(1.0, 1.0)
    summary, reward, _ = short.lines(TrainingProgress(), "none")
    assert (
        summary.startswith("Summary: 1 epoch in ")
        and "over the first 1 epoch, +1.000 over the last 1" in reward
    )


def test_a_start_on_simulated_bars_says_what_comes_next() -> None:
    report, real = Summary(0, is_simulated=True).lines(
        TrainingProgress(), "checkpoints/demo/run1_epoch50.pt"
    )[-2:]
    assert report.endswith(" evaluate checkpoints/demo/run1_epoch50.pt writes a report of it")
    assert "--sources binance" in real
    for summary, newest in (
        (Summary(0), "x.pt"),
        (Summary(0, is_simulated=True), "x.pt was not saved: full"),
    ):
        assert "Next" not in "".join(summary.lines(TrainingProgress(), newest))
