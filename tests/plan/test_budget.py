"""Budgets: what can be said, and what is refused."""

import pytest

from tersor.errors import BudgetError
from tersor.plan.budget import Budget, Limit


def test_a_line_of_text_becomes_limits():
    budget = Budget.parse(
        "size=0.15x, drop=0.5, latency_ms=12ms, memory=1.5MiB, macs=300M, f1>=81.8"
    )
    assert budget.size == Limit(0.15, relative=True)
    assert budget.drop == Limit(0.5)
    assert budget.latency_ms == Limit(12)
    assert budget.memory == Limit(1.5 * 2**20)
    assert budget.macs == Limit(300e6)
    assert budget.at_least == {"f1": 81.8}


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("18.2MB", 18_200_000), ("20kB", 20_000), ("0.25x", 250), ("512", 512)]
)
def test_sizes_resolve_against_the_original(text, size_bytes):
    assert Budget.parse(f"size={text}").size.resolve(1000) == size_bytes


def test_plain_values_are_understood_by_the_constructor():
    budget = Budget(
        size="0.15x",
        drop=0.5,
        memory=2_000_000,
        latency_ms=Limit(0.5, relative=True),
        at_least={"accuracy": 91},
        at_most={"mae": "0.25"},
        target="onnxruntime",
    )
    assert budget.size == Limit(0.15, relative=True)
    assert budget.drop == Limit(0.5)
    assert budget.memory == Limit(2e6)
    assert budget == Budget.parse(
        "size=0.15x, drop=0.5, memory=2MB, latency_ms=0.5x, accuracy>=91, mae<=0.25, "
        "target=onnxruntime"
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "asks for nothing"),
        ({"size": "a lot"}, "not a number with a unit"),
        ({"size": 0.25}, "less than one, .* write size=0.25x"),
        ({"size": True}, "not a number"),
        ({"drop": float("nan")}, "not a number"),
        ({"at_least": 90}, 'names no metric; try at_least={"accuracy": 90}'),
        ({"at_least": {"f1": 1}, "at_most": {"f1": 2}}, "f1 is given twice"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(BudgetError, match=said):
        Budget(**fields)


def test_a_mapping_from_a_job_file_is_the_same_as_a_line():
    mapping = {"size": "0.6x", "drop": None, "at_least": {"accuracy": 50}}
    assert Budget.of(mapping) == Budget.of("size=0.6x, accuracy>=50")


def test_a_relative_drop_is_a_share_of_the_metric():
    assert Budget.parse("drop=2%").drop.resolve(3.893) == pytest.approx(0.07786)


@pytest.mark.parametrize(
    "text",
    [
        "size=0.15x, drop=0.5",
        "drop=0.02x",
        "size=1000, acc>=90",
        "size=0.123456789x, acc>=90.1234567",
        "perplexity<=3.97, target=onnxruntime",
    ],
)
def test_what_a_budget_prints_reads_back_equal(text):
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget
    assert Budget.of(budget.as_json()) == budget


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "asks for nothing"),
        ("size", "is not name=value"),
        ("size=small", "not a number with a unit"),
        ("size=0x", "can be met by no model"),
        ("size=-3MB", "can be met by no model"),
        ("size=1.5x", "asks for nothing"),
        ("size=0.1x, size=0.2x", "given twice"),
        ("weight=3", "knows no 'weight'"),
        ("at_least=3", "names no metric"),
        ("acc>=90, acc<=95", "acc is given twice"),
        ("size=0.2", "less than one"),
        ("size>=0.2x=3", "is not name=value"),
        ("drop=-1", "can be met by no model"),
        ("size=0.1x, target=toaster", "toaster"),
        ("size=nanx", "not a number"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(text, said):
    with pytest.raises(BudgetError, match=said):
        Budget.parse(text)
