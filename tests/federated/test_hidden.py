"""Rounds whose updates nobody sees: the mean is the one of those heard, to a step of the grid."""

import numpy as np
import pytest
import torch

from federated.worlds import Toy, accuracy, drawn, entropy, normed, world
from tersor.errors import FileError, ModelError, OptionError
from tersor.federated import Hidden, Packing, Secure, Simulation, federate, lossy
from tersor.federated.grid import (
    off_grid,
    on_grid,
    read_table,
    read_vector,
    write_table,
    write_vector,
)
from tersor.federated.hidden import left_out
from tersor.federated.layout import Layout

SECURE = Secure(largest=0.5, bits=16)


def hidden(network=None, *, secure=SECURE, rounds=3, clients=5, **options):
    model, server, made = world(clients=clients, **options)
    members = [
        Hidden(i, client, secure, agreement=Toy(), entropy=entropy(i))
        for i, client in enumerate(made)
    ]
    done = federate(
        server,
        Simulation(members, network),
        rounds=rounds,
        protection=secure,
        agreement=Toy(),
        judge=lambda: accuracy(model),
        generator=drawn(2),
    )
    return model, server, done


def test_the_mean_is_that_of_plain_rounds_to_a_step_of_the_grid():
    _, server, _ = hidden(rounds=1)
    _, twin, clients = world()
    updates = []
    for number, client in enumerate(clients):
        client.receive(twin.download(number))
        updates.append(twin.read(number, client.update()))
    twin.advance(twin.mean(updates))
    # Each weighted change is off by less than a step; the mean divides by the sum of weights.
    heaviest = max(client.samples for client in clients)
    step = 0.5 / SECURE.top * 5 / (sum(client.samples for client in clients) / heaviest)
    for a, b in zip(server.state, twin.state, strict=True):
        assert float((a - b).abs().max()) < step


def test_the_sum_of_codes_is_exact_with_drop_outs(monkeypatch):
    from tersor.federated import hidden as module

    codes, totals = [], []
    carried, opened = module.on_grid, module.SecureSum.total
    monkeypatch.setattr(
        module, "on_grid", lambda *given: codes.append(carried(*given)) or codes[-1]
    )
    monkeypatch.setattr(
        module.SecureSum,
        "total",
        lambda hub, *given, **named: totals.append(opened(hub, *given, **named)) or totals[-1],
    )

    def network(round_, client, step, message):
        return None if step == "masked" and client in (1, 4, 8) else message

    _, _, done = hidden(network, clients=10, rounds=1)
    assert done.rounds[0].counted == [0, 2, 3, 5, 6, 7, 9]
    heard = [codes[i] for i in done.rounds[0].counted]
    assert np.array_equal(totals[0], np.sum(heard, 0, dtype=np.uint64).astype(np.uint32))


def test_it_learns_while_clients_drop_out():
    _, _, done = hidden(lossy(0.2, drawn(5)), rounds=8, clients=8)
    assert done.rounds[-1].judged > 0.8
    assert any(result.silent for result in done.rounds)
    assert all(len(r.counted) + len(r.silent) + len(r.refused) == 8 for r in done.rounds)


def test_a_round_with_too_few_is_left_out_and_the_next_goes_on():
    def network(round_, client, step, message):
        return None if round_ == 0 and step == "masked" and client < 3 else message

    _, _, done = hidden(network, rounds=2)
    first, second = done.rounds
    assert first.counted == []
    # The two that are left do not help to open so small a sum.
    assert "2 clients are left where threshold=4" in first.silent[3]
    assert set(first.silent) == set(range(5))
    assert len(second.counted) == 5
    assert second.judged > first.judged


@pytest.mark.parametrize("step", ["keys", "shares", "unsealed", "masked", "reveal"])
def test_who_answers_with_rubbish_is_refused_and_the_others_are_summed(step):
    def network(round_, client, what, message):
        return b"rubbish" * 9 if client == 2 and what == step else message

    _, _, done = hidden(network, rounds=1, secure=Secure(largest=0.5, threshold=3))
    if step == "reveal":
        # Its vector has arrived, and the others open the sum without it.
        assert done.rounds[0].counted == [0, 1, 2, 3, 4]
        assert done.rounds[0].refused == {}
    else:
        assert done.rounds[0].counted == [0, 1, 3, 4]
        assert done.rounds[0].refused[2]


def test_too_many_unreadable_answers_lose_the_round_and_are_named():
    def network(round_, client, what, message):
        return b"rubbish" * 9 if client in (1, 2) and what == "reveal" else message

    _, _, done = hidden(network, rounds=1)
    assert done.rounds[0].counted == []
    assert "unreadable shares of clients [1, 2] are left out" in done.rounds[0].refused[0]


@pytest.mark.parametrize("harmed", [{0}, {0, 1, 3}, {0, 1, 3, 4}])
def test_shares_that_do_not_open_cost_their_sender_alone(harmed):
    def network(round_, client, what, message):
        if client != 2 or what != "shares":
            return message
        return write_table(
            {n: bytes(len(b)) if n in harmed else b for n, b in read_table(message).items()}
        )

    _, server, done = hidden(network, rounds=1)
    assert done.rounds[0].counted == [0, 1, 3, 4]
    assert f"those of clients {sorted(harmed)} were not opened" in done.rounds[0].refused[2]
    _, twin, _ = hidden(lambda r, c, what, m: None if c == 2 and what == "shares" else m, rounds=1)
    assert all(a.equal(b) for a, b in zip(server.state, twin.state, strict=True))


def test_who_denies_the_shares_of_all_is_left_out_alone():
    def network(round_, client, what, message):
        if client == 2 and what == "unsealed":
            return write_table(dict.fromkeys((0, 1, 3, 4, 99), b""))
        return message

    _, _, done = hidden(network, rounds=1)
    assert done.rounds[0].counted == [0, 1, 3, 4]


def test_of_clients_at_odds_the_one_with_the_most_goes():
    # 1 denies all, and 4 sent 5 something else: of two, the sender goes.
    failed = {1: {2, 3, 4, 5}, 2: set(), 3: set(), 4: set(), 5: {4, 6}}
    assert left_out(failed) == {1: [2, 3, 4, 5], 4: [5]}
    assert left_out({1: set(), 2: set()}) == {}


def test_a_client_that_lost_its_state_comes_back():
    _, server, made = world(clients=4, down=Packing())
    members = [
        Hidden(i, client, SECURE, agreement=Toy(), entropy=entropy(i))
        for i, client in enumerate(made)
    ]

    def run():
        return federate(
            server,
            Simulation(members),
            rounds=1,
            protection=SECURE,
            agreement=Toy(),
            generator=drawn(),
        ).rounds[0]

    assert run().counted == [0, 1, 2, 3]
    members[1].client = world(clients=4)[2][1]
    second = run()
    assert "lost the state" in second.refused[1]
    assert second.counted == [0, 2, 3]
    assert run().counted == [0, 1, 2, 3]


def test_keys_that_fit_nobody_silence_nobody_else():
    def network(round_, client, what, message):
        return message[:4] + bytes(32) + message[36:] if client == 0 and what == "keys" else message

    _, _, done = hidden(network, rounds=1)
    assert "a public key is none" in done.rounds[0].refused[0]
    assert done.rounds[0].counted == [1, 2, 3, 4]


def test_a_client_that_claims_too_much_is_refused():
    _, _, done = hidden(rounds=1, most_samples=50)
    assert all("claims" in reason for reason in done.rounds[0].refused.values())
    assert done.rounds[0].refused


def test_the_same_seed_gives_the_same_state_and_bytes():
    first, second = hidden(), hidden()
    assert all(a.equal(b) for a, b in zip(first[1].state, second[1].state, strict=True))
    assert first[2].bytes_up == second[2].bytes_up


def test_each_number_takes_the_bytes_of_the_modulus():
    sizes = {}
    for bits, modulus in ((16, 32), (5, 8)):
        sizes[modulus] = hidden(secure=Secure(0.5, bits=bits, modulus_bits=modulus))[2].bytes_up
    # 99 numbers of 5 clients in 3 rounds, three bytes less each.
    assert sizes[32] - sizes[8] == 3 * 99 * 5 * 3


@pytest.mark.parametrize("modulus_bits", [8, 16, 24, 32])
def test_sums_come_back_from_the_grid_exactly(modulus_bits):
    layout = Layout(((3, 4), (5,)), 2)
    secure = Secure(largest=1.0, bits=min(5, modulus_bits), modulus_bits=modulus_bits)
    random = np.random.default_rng(0)
    codes = random.integers(-secure.top, secure.top + 1, (8, 17)).astype(np.int32)
    total = np.zeros(17, np.uint32)
    for row in codes:
        message = write_vector(row.view(np.uint32), 3, modulus_bits)
        assert len(message) == 12 + 17 * modulus_bits // 8
        total += read_vector(message, 17, 3, modulus_bits)
    found = torch.cat([tensor.reshape(-1) for tensor in off_grid(total, secure, layout)])
    assert torch.allclose(found * secure.top, torch.from_numpy(codes.sum(0)).float(), atol=1e-4)


def test_rounding_to_the_grid_is_right_on_average_and_cut_at_the_ends():
    secure = Secure(largest=1.0, bits=4)
    values = [torch.tensor([0.03, -0.5, 2.0, -7.0, 0.0])]
    generator = drawn()
    found = np.mean(
        [on_grid(values, secure, generator).view(np.int32) for _ in range(4000)], axis=0
    )
    assert np.allclose(found / secure.top, [0.03, -0.5, 1.0, -1.0, 0.0], atol=0.005)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (write_vector(np.zeros(4, np.uint32), 1, 32), "not one of round 0"),
        (write_vector(np.zeros(3, np.uint32), 0, 32), "no masked update of this network"),
        (write_vector(np.zeros(9, np.uint32), 0, 32), "bytes where .* are the most"),
        (write_vector(np.zeros(4, np.uint32), 0, 32)[:-1], "damaged"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(message, said):
    with pytest.raises(FileError, match=said):
        read_vector(message, 4, 0, 32)


def test_tables_come_back_and_broken_ones_are_refused():
    table = {3: b"abc", 70_000: b"", 0: bytes(300)}
    assert read_table(write_table(table)) == table
    for cut in (1, 200, 303):
        with pytest.raises(FileError, match="the table of clients"):
            read_table(write_table(table)[:-cut])


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: Secure(0), OptionError, "largest=0 must be above 0"),
        (lambda: Secure(1.0, bits=1), OptionError, "bits=1 must be a whole number from 2 to 24"),
        (lambda: Secure(1.0, modulus_bits=12), OptionError, "modulus_bits=12 must be 8, 16, 24"),
        (lambda: Secure(1.0, threshold=1), OptionError, "threshold=1 must be"),
        (lambda: Secure(1.0, threshold=9).needed(5), OptionError, "threshold=9 cannot be met by"),
        (lambda: Secure(1.0, threshold=2).needed(5), OptionError, "threshold=2 is no majority of"),
        (lambda: hidden(secure=Secure(1.0, threshold=6)), OptionError, "threshold=6 cannot be met"),
        (
            lambda: Secure(1.0, bits=6, modulus_bits=8).needed(5),
            OptionError,
            "modulus_bits=8 does not hold the sum of 5 clients with bits=6",
        ),
        (lambda: hidden(model=normed()), ModelError, "which Secure does not cover"),
    ],
)
def test_wrong_use_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_packing_that_would_do_nothing_is_refused():
    client = world(up=Packing(2))[2][0]
    with pytest.raises(OptionError, match=r"packing=Packing\(bits=2.* is as long as its modulus"):
        Hidden(0, client, SECURE, agreement=Toy(), entropy=entropy())


def test_steps_out_of_turn_are_refused():
    client = world()[2][0]
    member = Hidden(0, client, SECURE, agreement=Toy(), entropy=entropy())
    with pytest.raises(FileError, match="belongs to no round; begin with 'keys'"):
        member.answer("masked", b"")
    with pytest.raises(FileError, match="damaged"):
        member.answer("keys", b"")
