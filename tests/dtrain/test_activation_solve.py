"""The choice within a budget against all choices there are."""

import itertools
import random
import time

from dtrain.activations.solve import FLOPS_A_BYTE, Op, Option, options, richer_last, solve


def fronts(draw: random.Random) -> list[list[Option]]:
    def front() -> list[Option]:
        ops = [Op(("op", i), draw.randint(1, 9), draw.randint(1, 9)) for i in range(draw.randint(0, 3))]
        return options(ops, sum(op.flops for op in ops), draw.randint(0, 2), draw.randint(1, 30))

    kinds = [front() for _ in range(2)]
    return [draw.choice(kinds) for _ in range(draw.randint(1, 5))]


def test_the_choice_is_the_best_of_all() -> None:
    draw = random.Random(0)
    for _ in range(300):
        blocks, budget = fronts(draw), draw.randint(0, 60)
        best = min(
            (sum(o.work for o in chosen), sum(o.bytes for o in chosen))
            for chosen in itertools.product(*blocks)
            if sum(o.bytes for o in chosen) <= budget
        )
        chosen = [front[place] for front, place in zip(blocks, solve(blocks, budget), strict=True)]
        assert (sum(o.work for o in chosen), sum(o.bytes for o in chosen)) == best
        assert solve(blocks, budget) == solve(blocks, budget)


def test_options_are_all_subsets_that_nothing_beats() -> None:
    draw = random.Random(1)
    for _ in range(200):
        ops = [Op(("op", i), draw.randint(0, 9), draw.randint(1, 9)) for i in range(draw.randint(0, 5))]
        flops, passes = sum(op.flops for op in ops), draw.randint(0, 3)
        work, everything = flops + FLOPS_A_BYTE * passes, draw.randint(0, 40)
        subsets = [s for n in range(len(ops) + 1) for s in itertools.combinations(ops, n)]
        points = {(sum(o.bytes for o in s), work - sum(o.flops for o in s)) for s in subsets}
        points.add((everything, 0))
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        front = options(ops, flops, passes, everything)
        assert {(o.bytes, o.work) for o in front} == best
        assert [o.bytes for o in front] == sorted(o.bytes for o in front)
        by_call = {op.call: op for op in ops}
        for o in front:
            if o.saved is not None:
                assert o.bytes == sum(by_call[call].bytes for call in o.saved)
                assert o.flops == flops - sum(by_call[call].flops for call in o.saved)


def test_a_deep_model_is_solved_at_once() -> None:
    draw = random.Random(2)
    ops = [Op(("op", i), 1000 * (i + 1) + draw.randint(0, 9), draw.randint(10**9, 10**13)) for i in range(8)]
    front = options(ops, sum(op.flops for op in ops), 0, 90_000)
    begun = time.perf_counter()
    solve([front] * 61, 61 * 20_000)
    assert time.perf_counter() - begun < 60  # no measurement: an exponential search would take years


def test_late_blocks_of_a_kind_keep_the_most() -> None:
    assert richer_last([2, 0, 1, 3, 1], ["a", "b", "a", "b", "a"]) == [1, 0, 1, 3, 2]
