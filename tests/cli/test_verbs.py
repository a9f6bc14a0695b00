"""Every verb does its job, as a table and as JSON."""

import json
from pathlib import Path

import pytest
import yaml

DATA = "npz:data.npz"


def test_profile_counts_what_it_is_given(answer):
    found = answer("profile", "net.py:net", "--data", DATA)
    # 16 * 64 + 64 and 64 * 3 + 3 numbers in float32, and a multiply-add a weight and sample.
    assert found["size"]["parameters"] == 1283
    assert found["size"]["bytes"] == 4 * 1283
    assert found["macs"]["total"] == found["macs"]["batch"] * (16 * 64 + 64 * 3)
    assert found["macs"]["by_layer"].keys() == {"0", "2"}
    assert found["latency"]["threads"] == 1
    assert 0 <= found["quality"]["accuracy"]["value"] <= 100


def test_profile_without_data_says_what_is_missing(answer, tersor):
    found = answer("profile", "net.py:net")
    assert "macs" not in found
    assert "quality are missing" in found["notes"][0]
    shown = tersor("profile", "net.py:net")
    assert shown.exit_code == 0
    assert "Give --data" in shown.stdout


def test_profile_runs_on_the_example_of_a_factory(answer):
    found = answer("profile", "net.py:with_example")
    assert found["macs"]["total"] == 2 * (16 * 64 + 64 * 3)
    assert "quality" not in found


def test_compress_meets_its_budget_and_leaves_file_and_report(answer, folder):
    run = folder / "run"
    found = answer("compress", "net.py:net", "--data", DATA, "--budget", "size=0.9x", "--out", run)
    assert found["met"] is True
    size = (run / "model.tersor").stat().st_size
    assert found["after"]["bytes"] == size <= 0.9 * found["before"]["bytes"]
    page = (run / "report.html").read_text()
    assert "size=0.9x: met" in page
    assert json.loads((run / "report.json").read_text())["model"]["name"] == "net"
    assert found["command"].startswith("tersor compress net.py:net --data npz:data.npz --budget")


def test_compress_again_in_the_same_folder_gives_the_same_file(answer, folder):
    arguments = ("compress", "net.py:net", "--data", DATA, "--budget", "size=0.9x", "--out", "run")
    answer(*arguments)
    first = (folder / "run" / "model.tersor").read_bytes()
    answer(*arguments)
    assert (folder / "run" / "model.tersor").read_bytes() == first


def test_compress_without_data_says_what_that_costs(answer):
    found = answer("compress", "net.py:net", "--budget", "size=0.9x", "--out", "run")
    assert any("No data was given" in note for note in found["notes"])
    assert "comparison" not in found


def test_a_job_file_says_the_same_as_the_options(answer, folder):
    job = {"model": "net.py:net", "data": DATA, "budget": {"size": "0.9x"}, "out": "run"}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    found = answer("compress", "job.yaml", "--seed", "3")
    assert found["budget"] == {"size": "0.9x"}
    assert found["command"].endswith("--out run --seed 3")


def test_a_recipe_is_taken_as_it_is(answer, folder):
    (folder / "recipe.json").write_text('[{"method": "quantize.rtn", "options": {"bits": 6}}]')
    found = answer(
        "compress",
        "net.py:net",
        "--data",
        DATA,
        "--recipe",
        "recipe.json",
        "--out",
        "run",
        "--budget",
        "size=0.95x",
    )
    assert [step["method"] for step in found["recipe"]] == ["quantize.rtn"]
    assert found["recipe"][0]["options"]["bits"] == 6


def test_compare_measures_both_on_the_same_samples(answer, file):
    found = answer("compare", "net.py:net", file, "--data", DATA)
    assert found["comparison"]["n"] == 32
    # The smallest of 8-bit errors: the decisions of this network all stay.
    assert found["comparison"]["disagreement"] == 0
    assert 0 < found["comparison"]["divergence"] < 1e-3
    assert found["after"]["bytes"] < found["before"]["bytes"]


def test_compare_without_data_compares_sizes(answer, file):
    found = answer("compare", "net.py:net", file)
    assert found["comparison"] == {"notes": ["No data were given: only sizes are compared."]}
    assert found["before"]["file_bytes"] is None
    assert found["after"]["file_bytes"] == file.stat().st_size


def test_compare_lends_the_code_of_a_to_a_file_without_graph(answer, folder):
    import net

    from tersor.codec import save

    save(net.net(), folder / "weights.tersor", graph=False)
    found = answer("compare", "net.py:net", "weights.tersor", "--data", DATA)
    assert found["comparison"]["divergence"] == 0


def test_verify_finds_a_whole_file_whole(answer, tersor, file):
    found = answer("verify", file)
    assert found["bytes"] == file.stat().st_size
    assert found["graph"] is True
    assert "give --data" in tersor("verify", file).stdout


def test_verify_measures_the_metrics_again(answer, folder):
    answer("compress", "net.py:net", "--data", DATA, "--budget", "size=0.9x", "--out", "run")
    found = answer("verify", "run/model.tersor", "--data", DATA)
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["measured"] == pytest.approx(accuracy["stored"], abs=1e-3)


def test_verify_refuses_a_file_that_does_not_keep_its_promise(refused, folder):
    import net
    import torch

    from tersor.codec import save

    metrics = {"after": {"accuracy": 99.0}}
    save(net.net().eval(), "boast.tersor", example=torch.zeros(2, 16), metrics=metrics)
    text, code = refused("verify", "boast.tersor", "--data", DATA)
    assert code == 6
    assert "boast.tersor says accuracy=99" in text


def test_inspect_names_forms_and_bytes(answer, tersor, file):
    found = answer("inspect", file)
    assert found["bytes"] == file.stat().st_size
    forms = {tensor["name"]: tensor["form"] for tensor in found["tensors"]}
    assert forms == {
        "0.weight": "affine, 8 bits",
        "0.bias": "float32",
        "2.weight": "affine, 8 bits",
        "2.bias": "float32",
    }
    assert sum(t["bytes"] for t in found["tensors"]) < found["bytes"]
    assert found["recipe"][0]["method"] == "quantize.rtn"
    assert "affine, 8 bits" in tersor("inspect", file).stdout


def test_report_prints_a_run_again_and_rewrites_its_page(answer, tersor, folder):
    answer("compress", "net.py:net", "--budget", "size=0.9x", "--out", "run")
    page = folder / "run" / "report.html"
    text = page.read_text()
    page.unlink()
    shown = tersor("report", "run")
    assert shown.exit_code == 0
    assert "size=0.9x: met" in shown.stdout
    assert page.read_text() == text
    assert answer("report", "run/report.json", "--html", "other.html")["met"] is True
    assert Path("other.html").read_text() == text


def test_export_writes_an_onnx_file_that_agrees(answer, file, folder):
    pytest.importorskip("onnxruntime")
    found = answer("export", file, "--to", "onnx", "--out", "x.onnx", "--data", DATA)
    assert found["bytes"] == (folder / "x.onnx").stat().st_size
    assert found["difference"]["relative"] < 1e-4


def test_export_writes_an_openvino_file_that_agrees(answer, file, folder):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    found = answer("export", file, "--to", "openvino", "--out", "x.xml", "--data", DATA)
    assert found["difference"]["relative"] < 1e-4
    assert (folder / "x.xml").is_file()
    assert (folder / "x.bin").is_file()


def test_export_and_profile_make_up_inputs_for_a_file(answer, tersor, file, folder):
    said = "The inputs were made up: random numbers and ones"
    profiled = answer("profile", file)
    assert profiled["macs"]["total"] == 2 * (16 * 64 + 64 * 3)
    assert profiled["latency"]["median_ms"] > 0
    assert "quality" not in profiled
    assert "quality is not measured" in profiled["notes"][0]
    assert profiled["notes"][1].startswith(said)
    assert said in tersor("profile", file).stdout
    assert not any("made up" in note for note in answer("profile", file, "--data", DATA)["notes"])
    pytest.importorskip("onnxruntime")
    exported = answer("export", file, "--to", "onnx", "--out", "x.onnx")
    assert exported["notes"][0].startswith(said)
    assert exported["difference"]["relative"] < 1e-4
    assert exported["inputs"]["input"] == ["batch", 16]
    assert said in tersor("export", file, "--to", "onnx", "--out", "x.onnx").stdout


def test_a_file_compressed_again_keeps_its_graph_without_data(answer, file):
    found = answer("compress", file, "--budget", "size=0.9x", "--out", "run")
    assert any("The inputs were made up" in note for note in found["notes"])
    assert answer("inspect", "run/model.tersor")["graph_bytes"] > 0


def test_a_network_that_refuses_made_up_inputs_is_still_profiled(answer, refused, folder):
    import torch

    from tersor.codec import save

    # Ones are made up for integers, and a table of one row has none but row 0.
    save(torch.nn.Embedding(1, 4), folder / "one.tersor", example=torch.zeros(2, 3).long())
    found = answer("profile", "one.tersor")
    assert found["size"]["parameters"] == 4
    assert "macs" not in found
    assert "does not run on made-up inputs: index out of range" in found["notes"][1]
    text, code = refused("export", "one.tersor", "--out", "x.onnx")
    assert code == 4
    assert "give --data. The network does not run on made-up inputs: index out of" in text


def test_methods_lists_the_table_with_options(answer, tersor):
    from tersor.methods import TABLE

    found = answer("methods")
    assert [row["method"] for row in found] == list(TABLE)
    assert all(row["summary"] and "None" not in row["summary"] for row in found)
    one = answer("methods", "quantize.rtn")
    assert one["options"]["bits"] == 8
    assert "Source:" in one["about"]
    assert "bits per weight" in tersor("methods", "quantize.rtn").stdout
