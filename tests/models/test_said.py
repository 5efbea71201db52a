"""What a config says about its weights, against the architecture that is asked for."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dsad.core.errors import ConfigError
from dsad.core.types import RunInfo
from dsad.models import backbone, registry, vit
from dsad.models.decoder import DecoderConfig
from dsad.models.weights import export, pretrained
from tests.models import published

MODEL_ARGS = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
CLIP, QUICK = "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"
NOTES = ["natively QuickGELU, use quickgelu model variant for original results"]


def folder(tmp_path, architecture, cfg=None, shapes=None, **config):
    """A small network's weights in timm's names, and a config as timm writes it."""
    shapes = published.timm_vit(2, 24, 8, 4) if shapes is None else shapes
    safetensors.numpy.save_file(published.by_rule(shapes), tmp_path / "model.safetensors")
    found = {"architecture": architecture, "model_args": MODEL_ARGS, "pretrained_cfg": cfg or {}}
    (tmp_path / "config.json").write_text(json.dumps({**found, **config}))
    return tmp_path


def clip(tmp_path, architecture=CLIP, cfg=None, **config):
    shapes = published.timm_vit(2, 24, 8, 4, pre_norm=True, patch_bias=False, classes=5)
    return folder(tmp_path, architecture, cfg, shapes, **config)


# --- the activation of CLIP


@pytest.mark.parametrize(
    ("architecture", "cfg", "more", "quick"),
    [
        (CLIP, {"tag": "openai", "notes": NOTES}, {}, True),
        (CLIP, {"tag": "openai"}, {}, True),
        (CLIP, {"tag": "metaclip_400m", "notes": NOTES}, {}, True),
        (CLIP, {"notes": NOTES[0]}, {}, True),
        (CLIP, {"tag": "openai_ft_in1k"}, {}, None),
        (CLIP, {"tag": "laion2b", "notes": ["trained on LAION-2B"]}, {}, None),
        (QUICK, {}, {}, True),
        (CLIP, {}, {"model_args": {**MODEL_ARGS, "act_layer": "quick_gelu"}}, True),
        (CLIP, {"tag": "openai"}, {"model_args": {**MODEL_ARGS, "act_layer": "gelu"}}, False),
        (CLIP, {}, {"dsad": {"arch": CLIP}}, False),
        (QUICK, {}, {"dsad": {"arch": QUICK}}, True),
        ("vit_base_patch16_224", {"tag": "openai"}, {}, None),
    ],
)
def test_what_timms_config_tells_about_quickgelu(architecture, cfg, more, quick, tmp_path):
    assert pretrained.read(clip(tmp_path, architecture, cfg, **more)).quick_gelu is quick


def test_openais_clip_in_timms_repository_is_a_quickgelu_network(tmp_path):
    """Its config names the architecture with GELU, and notes what the weights want."""
    clip(tmp_path, cfg={"tag": "openai", "notes": NOTES})
    with pytest.raises(ConfigError, match=f"trained with QuickGELU.*Use {QUICK}") as error:
        backbone(CLIP, tmp_path)
    found = backbone(str(error.value).rpartition("Use ")[2].rstrip("."), tmp_path)
    given = published.by_rule(published.timm_vit(2, 24, 8, 4, pre_norm=True, patch_bias=False))
    want = backbone(
        QUICK, pretrained.Weights(tensors=given, options=dict(found.options), quick_gelu=True)
    )
    x = np.random.default_rng(3).standard_normal((1, 32, 32, 3)).astype(np.float32)
    for name, values in want(x).items():
        np.testing.assert_array_equal(found(x)[name], values)


def test_weights_of_clip_that_do_not_say_go_into_either(tmp_path):
    clip(tmp_path, cfg={"tag": "laion2b"})
    for arch in (CLIP, QUICK):
        assert backbone(arch, tmp_path).arch == arch


# --- the positions of masked autoencoders

MAE = vit.Arch(width=24, depth=2, heads=3, patch=8, image=32, pos="sincos", rule="plain")


def mae_state(decoder=None):
    return published.with_sines(published.by_rule(published.mae(2, 24, 8, 4, decoder=decoder)))


def small(state):
    options = {"width": 24, "depth": 2, "heads": 3, "patch": 8, "image": 32}
    return pretrained.Weights(tensors=state, options=options)


def test_a_supervised_transformer_is_no_masked_autoencoder():
    from dsad.objectives import mae

    learned = published.by_rule(published.timm_vit(2, 24, 8, 4))  # the same names and shapes
    gap = np.abs(learned["pos_embed"] - mae_state()["pos_embed"]).max()
    text = rf"pos_embed: expected the fixed sine-cosine table of 4 × 4 .* up to {gap:.3g}\."
    with pytest.raises(ConfigError, match=text):
        pretrained.mae_trees(MAE, learned)
    with pytest.raises(ConfigError, match=f"mae_vit_base_patch16: {text}"):
        backbone("mae_vit_base_patch16", small(learned))
    cfg = mae.Config(
        encoder=mae.EncoderConfig(arch="mae_vit_tiny_patch16", width=24, depth=2, heads=3, patch=8),
        decoder=DecoderConfig(width=16, depth=2, heads=2), view=mae.ViewConfig(side=32),
    )  # fmt: skip
    objective = mae.build(cfg, RunInfo(total_steps=1, batch_size=2, samples=2, classes=1))
    with pytest.raises(ConfigError, match=text):  # what init_from reads
        objective.read_tensors(learned)
    _, _, found = objective.read_tensors(mae_state(decoder=(3, 16)))
    np.testing.assert_array_equal(found["encoder"]["pos"], mae_state()["pos_embed"][0])


def test_every_fixed_table_is_looked_at():
    def other(name, change):
        state = mae_state(decoder=(2, 16))
        state[name] = change(state[name])
        return state

    def moved(table):
        table = table.copy()
        table[0, 5, 3] += 2e-4
        return table

    def rows_first(table):
        cells = table[:, 1:].reshape(1, 4, 4, -1).swapaxes(1, 2)
        return np.concatenate([table[:, :1], cells.reshape(1, 16, -1)], 1)

    for name in ("pos_embed", "decoder_pos_embed"):
        for change in (moved, rows_first, lambda t: np.full_like(t, np.nan), np.zeros_like):
            with pytest.raises(ConfigError, match=f"the masked autoencoder: {name}: expected"):
                pretrained.mae_trees(MAE, other(name, change))
    with pytest.raises(ConfigError, match=r"differs by up to 0\.0002"):
        pretrained.mae_trees(MAE, other("pos_embed", moved))
    backbone("mae_vit_base_patch16", small(other("decoder_pos_embed", moved)))  # has no decoder


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_tables_in_half_precision_are_within_its_rounding(dtype):
    state = {n: t.astype(dtype) for n, t in mae_state(decoder=(2, 16)).items()}
    params, extra = pretrained.mae_trees(MAE, state)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, extra))} == {np.dtype(np.float32)}
    state["pos_embed"] = published.by_rule({"pos_embed": (1, 17, 24)})["pos_embed"].astype(dtype)
    with pytest.raises(ConfigError, match="pos_embed: expected the fixed"):
        pretrained.mae_trees(MAE, state)


# --- the crop


def test_the_crop_of_the_weights_is_the_crop_of_their_export(tmp_path):
    """timm's preprocessing of an export is that of the weights, not of their architecture."""

    def exported(found, name):
        written = export.write(found, tmp_path / name, form="timm")
        return json.loads(written["config.json"].read_text())["pretrained_cfg"]["crop_pct"]

    source = tmp_path / "source"
    source.mkdir()
    arch = "vit_base_patch16_224"
    silent = backbone(arch, folder(source, arch))
    assert (silent.crop, exported(silent, "silent")) == (None, 0.9)
    said = backbone(arch, folder(source, arch, {"crop_pct": 0.95}))
    assert (said.crop, exported(said, "said")) == (0.95, 0.95)
    again = backbone(arch, tmp_path / "said")
    assert (again.crop, exported(again, "again")) == (0.95, 0.95)
    whole = dataclasses.replace(silent, crop=1.0)
    assert exported(whole, "whole") == export.as_weights(whole).crop == 1.0
    assert backbone(arch, export.as_weights(whole)).crop == 1.0


# --- the name of the architecture


@pytest.mark.parametrize(
    ("said", "asked", "use"),
    [
        ("deit_base_patch16_224", "vit_base_patch16_224", "deit_base_patch16_224"),
        (
            "vit_base_patch16_224", "deit_base_patch16_224",
            "vit_base_patch16_224 or mae_vit_base_patch16",
        ),
        (
            "vit_huge_patch14_224", "mae_vit_base_patch16",
            "vit_huge_patch14_224 or mae_vit_huge_patch14",
        ),
        ("vit_base_patch16_224", "resnet18", "vit_base_patch16_224 or mae_vit_base_patch16"),
        ("resnet50", "vit_base_patch16_224", "resnet50"),
    ],
)  # fmt: skip
def test_weights_of_another_architecture_are_refused_with_both_names(said, asked, use, tmp_path):
    folder(tmp_path, said)
    text = rf"model\.safetensors: their config says {said}, but {asked} is asked for. Use {use}\."
    with pytest.raises(ConfigError, match=text):
        backbone(asked, tmp_path)


def test_the_name_to_use_has_the_activation_of_the_weights(tmp_path):
    clip(tmp_path, cfg={"tag": "openai"})
    with pytest.raises(ConfigError, match=f"config says {CLIP}, but .*Use {QUICK} or {CLIP}"):
        backbone("vit_base_patch16_clip_224", tmp_path)


def test_names_that_mean_the_same_network_are_accepted(tmp_path):
    said = "vit_base_patch16_224"  # of MAE's encoder too, in timm
    state = folder(tmp_path, said)
    assert backbone(said, state).arch == said
    tensors = published.with_sines(pretrained.read(state))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    found = backbone("mae_vit_base_patch16", tmp_path)
    assert found.options == backbone(said, tmp_path).options
    # What dsad has no architecture for says nothing against the one that is asked for.
    folder(tmp_path, "vit_base_patch16_384")
    assert backbone("deit_base_patch16_224", tmp_path).arch == "deit_base_patch16_224"


def test_every_architecture_suits_the_name_that_its_export_has():
    for arch in registry.archs():
        family = registry.family_of(arch)
        name, _ = family.published(arch)
        for quick in (None, "quickgelu" in arch):
            assert arch in registry.family_of(name).suitable(name, quick)
        assert set(family.suitable(arch, None)) <= set(registry.archs())
