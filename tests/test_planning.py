"""`clicktrain plan`: the published figures of every configuration, the JSON contract, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from clicktrain import data
from clicktrain.errors import ConfigError, InvalidArgument
from clicktrain.planning import DATASETS, PlanReport, plan_report
from clicktrain.schedule import Stages


@dataclass(frozen=True)
class Row:
    """One row of the table of exact figures: millions of MACs and percents as written there."""

    addresses: str
    weights: int
    kept: int
    compression: str
    dense: str
    sparse: str
    inference: str
    training: tuple[str, str, str, str]  # A, B, C, D


TABLE = [
    Row("cifar10_vgg11@5.85x cifar100_vgg11@5.85x", 9_217_728, 1_576_216, "5.8480", "152.76", "34.90", "77.15",
        ("19.0", "50.6", "33.7", "34.8")),
    Row("cifar100_vgg11@7.9x", 9_217_728, 1_166_620, "7.9012", "152.76", "28.19", "81.54",
        ("20.1", "53.4", "35.6", "36.8")),  # B is 53.447; a head for 10 classes instead of 100 would give 53.463
    Row("cifar100_vgg11@8.4x", 9_217_728, 1_102_724, "8.3591", "152.76", "26.93", "82.37",
        ("20.3", "54.0", "36.0", "37.1")),
    Row("cifar10_vgg11@8.7x", 9_217_728, 1_061_760, "8.6816", "152.76", "27.77", "81.82",
        ("20.2", "53.6", "35.8", "36.9")),
    Row("cifar100_vgg11@10.3x", 9_217_728, 899_232, "10.2507", "152.76", "23.66", "84.51",
        ("20.8", "55.4", "36.9", "38.1")),
    Row("cifar10_vgg11@10.3x", 9_217_728, 894_640, "10.3033", "152.76", "24.63", "83.88",
        ("20.7", "55.0", "36.7", "37.8")),
    Row("cifar10_vgg11@11.5x", 9_217_728, 799_616, "11.5277", "152.76", "21.94", "85.64",
        ("21.1", "56.1", "37.4", "38.6")),
    Row("cifar10_vgg13@4x", 9_402_048, 2_322_340, "4.0485", "228.26", "67.36", "70.49",
        ("15.2", "46.6", "31.1", "30.9")),
    Row("cifar100_vgg13@4.3x", 9_402_048, 2_184_880, "4.3032", "228.26", "66.15", "71.02",
        ("16.4", "48.5", "32.3", "32.4")),
    Row("cifar10_vgg13@6.2x cifar100_vgg13@6.2x", 9_402_048, 1_522_968, "6.1735", "228.26", "49.58", "78.28",
        ("17.3", "53.4", "35.6", "35.3")),
    Row("cifar100_vgg13@8.5x", 9_402_048, 1_105_180, "8.5073", "228.26", "39.52", "82.69",
        ("19.1", "56.4", "37.6", "37.8")),
    Row("cifar10_vgg13@9.0x", 9_402_048, 1_040_460, "9.0364", "228.26", "41.19", "81.95",
        ("18.1", "55.9", "37.3", "37.0")),
    Row("cifar100_vgg16@commented", 14_710_464, 2_550_236, "5.7683", "313.20", "72.86", "76.74",
        ("16.5", "54.8", "36.6", "35.7")),
    Row("cifar10_vgg16@commented", 14_710_464, 2_550_236, "5.7683", "313.20", "72.86", "76.74",
        ("10.9", "16.1", "10.8", "13.5")),
    Row("cifar100_vgg16@active", 14_710_464, 1_665_500, "8.8325", "313.20", "57.13", "81.76",
        ("17.6", "58.4", "38.9", "38.0")),
    Row("cifar10_vgg16@active", 14_710_464, 1_665_500, "8.8325", "313.20", "57.13", "81.76",
        ("11.6", "17.2", "11.5", "14.4")),
    Row("cifar10_resnet32@8.6x", 19_908_288, 2_321_680, "8.5749", "1083.90", "162.82", "84.98",
        ("21.9", "57.7", "38.5", "39.8")),
    Row("cifar10_resnet32@13.9x", 19_908_288, 1_436_924, "13.8548", "1083.90", "115.00", "89.39",
        ("23.1", "60.7", "40.5", "41.9")),
    Row("cifar10_resnet50@8.35x", 20_678_336, 2_475_879, "8.3519", "1297.81", "337.51", "73.99",
        ("19.1", "50.2", "33.5", "34.7")),
    Row("cifar10_resnet50@active", 20_678_336, 1_707_058, "12.1134", "1297.81", "272.50", "79.00",
        ("20.4", "53.6", "35.8", "37.0")),
    Row("imagenet_resnet50@active", 20_686_016, 7_334_455, "2.8204", "4087.14", "2085.23", "48.98",
        ("8.8", "30.9", "20.6", "19.8")),
]  # fmt: skip
CASES = [pytest.param(address, row, id=address) for row in TABLE for address in row.addresses.split()]

ALL_CONVS = {
    "cifar10_resnet32@13.9x": "12.48",
    "cifar10_resnet32@8.6x": "8.05",
    "cifar10_resnet50@8.35x": "4.47",
    "cifar10_resnet50@active": "5.24",
    "imagenet_resnet50@active": "2.32",
}
RELEASED_COUNTER = {
    "cifar10_vgg11@5.85x": "5.831",
    "cifar100_vgg11@7.9x": "7.869",
    "cifar100_vgg11@8.4x": "8.323",
    "cifar10_vgg11@8.7x": "8.642",
    "cifar100_vgg11@10.3x": "10.194",
    "cifar10_vgg11@10.3x": "10.246",
    "cifar10_vgg11@11.5x": "11.456",
    "cifar10_vgg13@4x": "4.041",
    "cifar100_vgg13@4.3x": "4.294",
    "cifar10_vgg13@6.2x": "6.154",
    "cifar100_vgg13@8.5x": "8.467",  # (9402048 + 5888) / (1105180 + 5888) = 8.46747
    "cifar10_vgg13@9.0x": "8.991",
}


def paper_weights(report: PlanReport) -> tuple[int, int]:
    convs = [layer for layer in report.layers if layer.kind == "conv" and not layer.is_shortcut]
    return sum(layer.weights for layer in convs), sum(layer.kept for layer in convs)


@pytest.mark.parametrize(("address", "row"), CASES)
def test_published_figures(address: str, row: Row) -> None:
    report = plan_report(config=f"official:{address}")
    plan = json.loads(report.to_json())
    assert paper_weights(report) == (row.weights, row.kept)
    assert f"{plan['compression']['paper']:.4f}" == row.compression
    assert f"{plan['inference_macs']['dense'] / 1e6:.2f}" == row.dense
    assert f"{plan['inference_macs']['sparse'] / 1e6:.2f}" == row.sparse
    assert f"{plan['inference_macs_saved']:.2f}" == row.inference
    assert tuple(f"{plan['training_flops_saved'][name]:.1f}" for name in "ABCD") == row.training
    if address in ALL_CONVS:
        assert f"{plan['compression']['all_convs']:.2f}" == ALL_CONVS[address]
        assert plan["compression"]["released_counter"] == plan["compression"]["paper"]
    else:
        assert plan["compression"]["all_convs"] == plan["compression"]["paper"]
    if address in RELEASED_COUNTER:
        assert f"{plan['compression']['released_counter']:.3f}" == RELEASED_COUNTER[address]


def test_json_contract() -> None:
    report = plan_report(model="vgg13", dataset="cifar10", config="official:cifar10_vgg13")
    plan = json.loads(report.to_json())
    assert {name: type(value) for name, value in plan["compression"].items()} == {
        "paper": float,
        "all_convs": float,
        "released_counter": float,
    }
    assert plan["inference_macs"] == {"dense": 228_261_888, "sparse": 41_192_400}
    assert list(plan["training_flops_saved"]) == ["A", "B", "C", "D"]
    assert (plan["model"], plan["dataset"], plan["config"]) == ("vgg13", "cifar10", "official:cifar10_vgg13@9.0x")
    assert plan["stages"] == {"select_at": 60, "prune_at": 148, "epochs": 190}
    second = plan["layers"][1]
    assert second == {
        "name": "features.3",
        "kind": "conv",
        "kernel_size": [3, 3],
        "out_shape": [64, 32, 32],
        "is_shortcut": False,
        "weights": 36_864,
        "kept": 9_828,  # 4096 - ceil(0.4 * 4096) = 2457 kernels of 4
        "macs": {"dense": 37_748_736, "sparse": 10_063_872},
    }
    convs = [layer for layer in plan["layers"] if layer["kind"] == "conv"]
    assert sum(layer["macs"]["sparse"] for layer in convs) == plan["inference_macs"]["sparse"]


def test_text_shows_the_same_figures() -> None:
    text = plan_report(config="official:cifar10_resnet50@8.35x").to_text()
    for figure in ("8.3519 paper", "4.4706 all_convs", "1297.81 M dense", "337.51 M sparse", "73.99 %", "A 19.1 %"):
        assert figure in text
    lines = text.splitlines()
    table = lines[2 : lines.index("", 2)]
    assert len(table) == 53 + 5  # convolutions; head, linear layer, sum, two rules
    assert len({len(line) for line in table}) == 1


def test_without_budget_the_plan_is_of_the_dense_network() -> None:
    report = plan_report(model="vgg11", dataset="cifar100")
    assert set(report.compression.values()) == {1.0}
    assert report.inference_macs["dense"] == report.inference_macs["sparse"]
    assert set(report.training_flops_saved.values()) == {0.0}
    assert report.layers[-1].out_shape == (100,)


def test_ratios_as_text_equal_the_configuration_that_lists_them() -> None:
    given = plan_report(model="vgg13", dataset="cifar10", ratios="40,50,55,60,65,70,75,75,85")
    official = plan_report(config="official:cifar10_vgg13")
    assert given.layers == official.layers
    assert given.compression == official.compression


def test_ratios_may_stand_for_blocks() -> None:
    by_block = plan_report(model="resnet32", dataset="cifar10", width=0.25, ratios=[50] * 15)
    by_layer = plan_report(model="resnet32", dataset="cifar10", width=0.25, ratios=[50] * 30)
    assert by_block.layers == by_layer.layers


def test_pruned_kernels_are_counted_exactly() -> None:
    # 0.55 % of 4096 kernels are 22.528: 23 go. In binary floating point 0.07 * 100 would be above 7.
    report = plan_report(model="vgg13", dataset="cifar10", ratios="0.55,7,0,0,0,0,0,0,0")
    kept = {layer.name: layer.kept for layer in report.layers}
    assert kept["features.3"] == 4 * (4096 - 23)
    assert kept["features.7"] == 4 * (8192 - 574)  # 573.44
    assert kept["features.10"] == 4 * 128 * 128


def test_arguments_go_before_the_configuration() -> None:
    report = plan_report(
        config="official:cifar10_vgg13", dataset="fashion-mnist-small", width=0.25, stages=Stages(10, 50, 100)
    )
    assert (report.model, report.data.image) == ("vgg13", (1, 32, 32))
    assert report.layers[0].weights == 1 * 16 * 9
    assert report.stages == Stages(10, 50, 100)
    saved = report.training_flops_saved
    assert saved["B"] / saved["A"] == pytest.approx(90 / 50)


def test_a_budget_replaces_that_of_the_configuration() -> None:
    report = plan_report(config="official:cifar10_vgg13", target_compression=4)
    assert report.compression["paper"] == pytest.approx(4, rel=1e-4)
    assert report.stages == Stages(60, 148, 190)


@pytest.mark.parametrize("model", ["vgg13", "resnet50"])
@pytest.mark.parametrize("target", [3.0, 9.0])
def test_target_compression_is_met_from_above(model: str, target: float) -> None:
    report = plan_report(model=model, dataset="cifar10", width=0.25, target_compression=target)
    assert target <= report.compression["paper"] < 1.001 * target
    assert "estimate" in report.budget


def test_target_flops_is_met_from_above() -> None:
    report = plan_report(model="resnet32", dataset="cifar10", width=0.25, target_flops=5)
    ratio = report.inference_macs["dense"] / report.inference_macs["sparse"]
    assert 5 <= ratio < 5.01


def test_default_stages_are_those_of_the_preset_paper() -> None:
    assert plan_report(model="vgg11", dataset="cifar10", width=0.25).stages == Stages(55, 95, 190)


def test_image_folders_are_planned_without_being_read() -> None:
    report = plan_report(
        model="vgg11", dataset="imagefolder:/nowhere", width=0.25, num_classes=7, image_size=64, ratios=[50] * 7
    )
    assert report.data.image == (3, 64, 64)
    assert report.layers[-1].out_shape == (7,)


def test_image_size_changes_macs_only() -> None:
    small = plan_report(model="vgg11", dataset="cifar10", width=0.25, ratios=[50] * 7)
    large = plan_report(model="vgg11", dataset="cifar10", width=0.25, ratios=[50] * 7, image_size=64)
    assert large.compression == small.compression
    assert large.inference_macs["dense"] == 4 * small.inference_macs["dense"]


def test_known_data_sets_are_those_that_can_be_loaded() -> None:
    assert {*DATASETS, "imagefolder:PATH"} == set(data.names())
    embedded = data.load("fashion-mnist-small")
    shape = DATASETS["fashion-mnist-small"]
    assert (embedded.image_shape, embedded.num_classes) == (shape.image, shape.num_classes)


def test_run_configuration_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[data]\nname = "cifar10"\n[model]\nname = "vgg11"\nwidth = 0.25\n[train]\nepochs = 20\n'
        '[method]\nname = "clicktrain"\n[method.options]\ntarget_compression = 5.0\nselect_at = 4\nprune_at = 8\n'
    )
    report = plan_report(config=str(path))
    assert (report.model, report.dataset, report.width) == ("vgg11", "cifar10", 0.25)
    assert report.compression["paper"] == pytest.approx(5, rel=1e-2)
    assert report.stages == Stages(4, 8, 20)


def test_run_configuration_of_a_dense_run(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nname = "vgg11"\nwidth = 0.25\n[method]\nname = "dense"\n')
    report = plan_report(config=str(path))
    assert report.compression["paper"] == 1.0
    assert report.budget == "method dense: dense"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vgg12"}, "unknown name 'vgg12'"),
        ({"dataset": "cifar11"}, r"dataset: unknown name 'cifar11' \(did you mean cifar10+\?\)"),
        ({"model": None}, "model: expected a name, or a config that gives one"),
        ({"dataset": None}, "dataset: expected a name, or a config that gives one"),
        ({"config": "official:nothing"}, "no official configuration 'nothing'"),
        ({"ratios": "50,50"}, r"ratios: expected 9 values \(one a prunable convolution\), got 2"),
        ({"ratios": "50"}, "ratios: expected 9 values .* got 1"),
        ({"ratios": "50,x"}, "ratios: expected numbers .* got 'x'"),
        ({"ratios": [100] + [50] * 8}, "100"),
        ({"ratios": [50] * 9, "target_compression": 4}, "target_compression and ratios"),
        ({"target_compression": 0.5}, r"target_compression=0.5: feasible are 2\.2.* to "),
        ({"target_compression": 1000}, "target_compression=1000: feasible are"),
        ({"target_compression": float("nan")}, "target_compression"),
        ({"width": -1}, "width: expected a positive channel multiplier, got -1"),
        ({"dataset": "imagefolder:x"}, "does not read imagefolder:x and needs num_classes and image_size"),
        ({"image_size": 8}, "input_size: 8 is too small for vgg13"),
    ],
)
def test_bad_arguments_give_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        plan_report(**{"model": "vgg13", "dataset": "cifar10", "width": 0.25, **arguments})
    assert "\n" not in str(caught.value)


def test_wrong_number_of_ratios_for_a_residual_network_names_both_counts() -> None:
    with pytest.raises(ConfigError, match=r"expected 30 values .* or 15 \(one a residual block\), got 9"):
        plan_report(model="resnet32", dataset="cifar10", width=0.25, ratios=[50] * 9)


def test_planning_a_cifar_network_needs_neither_torchvision_nor_fvcore() -> None:
    code = (
        "import sys\n"
        "from clicktrain.planning import plan_report\n"
        "plan_report(config='official:cifar10_vgg11')\n"
        "print(sorted({'torchvision', 'fvcore', 'pydantic', 'typer'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
