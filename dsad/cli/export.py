"""``dsad export``: an encoder as files that timm, torchvision and anomalib load."""

from dsad.assembly import runs
from dsad.assembly.saving import INDEX
from dsad.core import paths
from dsad.core.errors import ConfigError
from dsad.core.tree import count
from dsad.evaluation import stamp
from dsad.models import registry
from dsad.models.weights import export
from dsad.terminal import flags

#: How the other library loads what was written.
_USE = {
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "torchvision": (
        "net = torchvision.models.{arch}(); net.fc = torch.nn.Identity(); net.load_state_dict("
        'safetensors.torch.load_file("{folder}/model.safetensors"))'
    ),
}


def main(argv: list[str]) -> int:
    """The command."""
    command = flags.Command(
        "export", "write an encoder as model.safetensors and config.json under published names.",
        positional=True,
    )  # fmt: skip
    command.string("backbone", "", "run:DIR, run:DIR@STEP, or an architecture with --weights.")
    command.string("weights", "", "File, directory, hf:owner/name[@revision][/file] or run:DIR.")
    command.string("format", "", f"Names to write, default the first: {export.formats()}.")
    command.string("out", "", "Directory to write into.")
    command.switch("overwrite", "Replace an earlier export there.")
    _, values, rest = command.parse(argv)
    if rest or not values.backbone or not values.out:
        raise ConfigError(
            "dsad export: expected --backbone=SPEC and --out=DIR, for example --backbone=run:runs/a"
            f" --out=exported{'; found ' + ' '.join(rest) if rest else ''}."
        )
    if (paths.directory(values.backbone) / INDEX).exists():
        raise ConfigError(
            f"--backbone={values.backbone}: a fitted model, which dsad predict and dsad evaluate "
            "--model=DIR take as it is. Exported are encoders: run:DIR, or an architecture with "
            "--weights."
        )
    export.check_free(paths.directory(values.out), values.overwrite)
    found = runs.encoder(values.backbone, values.weights)
    formats = registry.family_of(found.arch).formats
    form = values.format or (formats[0] if formats else "")
    written = export.write(
        found, values.out, form=form, about={"code": stamp.code_version()},
        overwrite=values.overwrite,
    )  # fmt: skip
    print(f"{found.arch} ({found.description}): {count(found.params):,} parameters")
    for what, names in found.left_out:
        print(f"left out, {what}: {_some(names)}")
    for path in written.values():
        print(f"written: {path} ({path.stat().length:,} bytes)")
    if form in _USE:
        print(f"use: {_USE[form].format(folder=values.out, arch=found.arch)}")
    return 0


def _some(names: tuple[str, ...]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, .. ({len(names)} tensors)"
