"""What a config says about its weights, against the architecture that is asked for."""

import json

import numpy as np
import pytest
import safetensors.numpy

from dsad.core.errors import ConfigError
from dsad.models import backbone, pretrained
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
