"""What the variants of DS2 and DenseCL set, and that words which contradict each other are told."""

import pytest

from dsad.assembly.pretrain import parse
from dsad.core.errors import ConfigError
from dsad.terminal import flags


def loaded(spec):
    config, _, _ = flags.Command("x", "", config=spec).parse([])
    run, _, objective = parse(config)
    return run, objective


def test_pixpro_has_its_own_numbers():
    run, method = loaded("ds2:pixpro_published")
    assert (run.optim.name, run.optim.lr, run.optim.lr_batch) == ("lars", 1.0, 256)
    assert (run.optim.weight_decay, run.optim.schedule) == (1e-5, "cosine")
    assert (run.batch_size, run.epochs, run.optim.warmup_epochs) == (1024, 100, 5)
    assert (method.layers, method.threshold, method.top1) == (("layer4",), 0.7, "off")
    assert (method.hidden, method.out, method.average_directions) == (4096, 256, False)
    for view, blur, solarize in ((method.view1, 1.0, 0.0), (method.view2, 0.1, 0.2)):
        assert (view.blur_probability, view.solarize_probability) == (blur, solarize)
        assert (view.grey_probability, view.jitter) == (0.2, (0.4, 0.4, 0.2, 0.1))
        assert view.area == (0.08, 1.0)
    assert loaded("ds2:pixpro")[1].view2.solarize_probability == 0.5  # as the DS2 code has it


def test_negatives_come_with_adam():
    run, method = loaded("ds2:small,infonce")
    optim = run.optim
    assert (optim.name, optim.lr, optim.lr_batch, optim.weight_decay) == ("adamw", 1e-3, 0, 0)
    assert (method.threshold, method.top1, method.propagation) == (0.5, "off", False)
    negatives = method.negatives
    assert (negatives.source, negatives.distance, negatives.temperature) == ("batch", 1.5, 0.2)
    alone = loaded("ds2:small,adam")
    assert alone[0].optim == optim
    assert alone[1].negatives.source == "off"


def test_published_images_keep_their_pixels():
    """The largest of MVTec AD have 1,024; where another size is asked for, it is that one's."""
    assert loaded("ds2:published")[0].data.canvas == 1024
    assert loaded("ds2")[0].data.canvas == 512
    with pytest.raises(ConfigError, match=r"config\.optim\.published_schedule.*'cosine'"):
        loaded("ds2:published,small")


def test_fine_blurs_in_proportion_to_its_views():
    _, method = loaded("ds2:small,fine")
    assert method.view1.blur == method.view2.blur == (0.05, 1.0)
    assert loaded("ds2:small")[1].view1.blur == (0.1, 2.0)


def test_densecl_is_the_published_one():
    run, method = loaded("densecl")
    optim, negatives = run.optim, method.negatives
    assert (optim.name, optim.lr, optim.lr_batch, optim.momentum) == ("sgd", 0.03, 256, 0.9)
    assert (optim.weight_decay, optim.schedule, optim.warmup_epochs) == (1e-4, "cosine", 0)
    assert (run.batch_size, run.epochs) == (256, 200)
    assert (method.arch, method.layers) == ("resnet50", ("layer4",))
    assert (method.hidden, method.hidden_norm, method.out) == (2048, False, 128)
    assert (method.momentum, method.momentum_end) == (0.999, 0.999)
    assert (method.threshold, method.top1, method.top1_similarity) == (0, "cell", "cosine")
    assert (negatives.source, negatives.queue, negatives.temperature) == ("queue", 65536, 0.2)
    assert negatives.whole == 0.5
    assert method.view1 == method.view2
    assert method.view1.area == (0.2, 1.0)
    assert method.view1.jitter == (0.4, 0.4, 0.4, 0.1)
    assert (method.view1.grey_probability, method.view1.blur_probability) == (0.2, 0.5)
