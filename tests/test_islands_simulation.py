"""The simulation of islands agrees with the arithmetic wherever there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks.islands_simulation import LEASES, WAITING, Loss, Outcome, Setup, share_out, simulate, slowness

ROUND = 30 * 1.2 + 0.5
NO_STATES = 10**6


def with_losses(setup: Setup, losses: dict[int, list[Loss]]) -> Outcome:
    return simulate(setup, losses=lambda cluster: losses.get(cluster, []))


@pytest.mark.parametrize("islands", [1, 2, 8])
@pytest.mark.parametrize("mbit", [100.0, 1000.0])
def test_a_round_without_delay_takes_its_steps_the_codec_and_the_transfers(islands: int, mbit: float) -> None:
    setup = Setup(islands=islands, mbit=mbit)
    # All send at the same time, then each receives the files of the others. One island receives none, and the result
    # of its own round is there at once.
    exchange = setup.file_seconds * islands if islands > 1 else 0.0
    assert setup.file_seconds == pytest.approx(69.4e6 * 4.0625 / (mbit * 1e6))
    outcome = simulate(setup)
    assert outcome.seconds == pytest.approx(100 * (ROUND + exchange))
    assert outcome.goodput == pytest.approx(36 / (ROUND + exchange))
    assert outcome.replayed == outcome.restored == outcome.losses == 0


def test_links_without_a_limit_leave_the_codec() -> None:
    assert simulate(Setup(islands=64, mbit=float("inf"))).goodput == pytest.approx(36 / ROUND)


@pytest.mark.parametrize(("delay", "hidden"), [(5, 6.0), (12, 14.4), (29, 34.8)])
def test_a_delay_hides_as_much_of_the_exchange_as_its_steps_take(delay: int, hidden: float) -> None:
    setup = Setup(islands=8, delay=delay)
    exchange = 8 * setup.file_seconds
    last = exchange  # the last round has no delay
    expected = 100 * ROUND + 99 * max(0.0, exchange - hidden) + last
    assert simulate(setup).seconds == pytest.approx(expected)


def test_all_wait_for_the_slowest() -> None:
    setup = Setup(islands=8, mbit=float("inf"), codec=0.0, cluster_spread=0.2)
    factors = [1 / simulate(replace(setup, islands=1), seed).goodput for seed in range(3)]
    assert factors == pytest.approx([1.0, 1.0, 1.0])  # compared with its own speed
    found = slowness(setup, 0)
    assert max(found) / min(found) > 1.2
    assert simulate(setup).seconds == pytest.approx(3000 * 1.2 * max(found))


def test_the_bytes_are_those_of_files_and_states() -> None:
    setup = Setup(islands=4, state_every=10)
    outcome = simulate(setup)
    file, state = 69.4e6 * 4.0625 / 8, 69.4e6 * 20
    assert outcome.bytes_up == pytest.approx(4 * (100 * file + 9 * state))
    assert outcome.bytes_down == pytest.approx(4 * 3 * 100 * file)


def test_a_state_that_is_sent_beside_costs_nothing_and_otherwise_its_time() -> None:
    setup = Setup(islands=4, delay=12, state_every=10)
    without = simulate(replace(setup, state_every=NO_STATES)).seconds
    assert simulate(setup).seconds == pytest.approx(without)
    # The file of the round follows the state on the link, so nothing of the state is hidden.
    blocking = simulate(replace(setup, states_beside=False))
    assert blocking.seconds == pytest.approx(without + 9 * setup.state_seconds)


def test_downloads_that_are_not_beside_are_not_hidden_by_a_delay() -> None:
    setup = Setup(islands=4, delay=12, downloads_beside=False)
    files = 3 * setup.file_seconds
    last = 4 * setup.file_seconds
    assert simulate(setup).seconds == pytest.approx(100 * ROUND + 99 * files + last)


def test_one_loss_while_all_wait() -> None:
    # Round 15 has run for 10 s when cluster 1 is lost. After 500 s it is back, without anything. It receives two files
    # of each of the rounds 11 to 14 and the other island's of round 15, then the state after round 10. It makes rounds
    # 11 to 14 again, then round 15, and waits for no file then.
    setup = Setup(islands=2, policy=WAITING)
    round = ROUND + 2 * setup.file_seconds
    at = 14 * round + 10
    outcome = with_losses(setup, {1: [Loss(at, 500.0)]})
    restored = at + 500 + 9 * setup.file_seconds + setup.state_seconds
    assert outcome.seconds == pytest.approx(restored + 5 * ROUND + 85 * round)
    assert (outcome.losses, outcome.restored, outcome.replayed) == (1, 1, 5 * 30)


def test_one_loss_that_a_spare_takes_over() -> None:
    # The spare has the files already, also the other island's of round 15. It begins when the lease is lost. The
    # cluster that returns becomes the spare.
    setup = Setup(islands=2, policy=LEASES, spares=1)
    round = ROUND + 2 * setup.file_seconds
    at = 14 * round + 10
    outcome = with_losses(setup, {1: [Loss(at, 5000.0)]})
    assert outcome.seconds == pytest.approx(at + 60 + setup.state_seconds + 5 * ROUND + 85 * round)
    assert (outcome.losses, outcome.restored, outcome.replayed) == (1, 1, 5 * 30)


def test_one_loss_that_another_cluster_takes_over_for_good() -> None:
    # From then on, one cluster makes the rounds of two islands in turn, and needs no downloads. When it begins with the
    # second island, it has made round 15 of its own. A round exchanges the islands twice.
    setup = Setup(islands=2, policy=LEASES)
    round = ROUND + 2 * setup.file_seconds
    at = 14 * round + 10
    outcome = with_losses(setup, {1: [Loss(at, 10.0**9)]})
    begins = at + 60 + setup.state_seconds + setup.switch
    assert outcome.seconds == pytest.approx(begins + 5 * ROUND + 85 * 2 * (ROUND + setup.switch))


def test_a_short_loss_moves_no_lease() -> None:
    setup = Setup(islands=2, policy=LEASES, spares=1)
    outcome = with_losses(setup, {1: [Loss(10.0, 50.0)]})
    transfers_of_round_1 = 2 * setup.file_seconds  # are over before cluster 1 has made the round
    assert outcome.seconds == pytest.approx(simulate(setup).seconds + 60 - transfers_of_round_1)
    assert outcome.restored == 1


def test_a_run_is_a_function_of_its_setup_and_seed() -> None:
    setup = Setup(islands=8, mbit=1000, loss_every=3600, spares=1, cluster_spread=0.05, step_spread=0.1, delay=12)
    first = simulate(setup, 3)
    assert first == simulate(setup, 3)
    assert first != simulate(setup, 4)
    assert first.losses > 3


def test_islands_are_shared_out_evenly_and_few_move() -> None:
    assert share_out([0, 1, 2, 3], [0, 1, 2, 3, 4]) == [0, 1, 2, 3]
    assert share_out([0, 1, 2, 3], [0, 2, 3, 4]) == [0, 4, 2, 3]
    assert share_out([0, 1, 2, 3], [0, 2, 3]) == [0, 0, 2, 3]
    assert share_out([0, 0, 2, 3], [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert share_out([0, 1, 2, 3], []) == [0, 1, 2, 3]
