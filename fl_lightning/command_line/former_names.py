"""Configurations that version 0.1 saved, in today's names."""

from typing import Any

FORMER_MODULES = {
    "attack_modules.cifar10_classifier": "attack_modules.evaluation.cifar10_classifier",
    "attack_modules.diffusion.photo_crops": "attack_modules.diffusion.trained.photo_crops",
    "attack_modules.diffusion.prior": "attack_modules.diffusion.trained.photo_prior",
    "attack_modules.diffusion.small": "attack_modules.diffusion.trained.class_conditional",
}
FORMER_CLASSES = {"Cifar10Training": "Cifar10Classifier", "ConditionalTraining": "ClassConditionalDiffusion"}
FORMER_SETTINGS = {"scale_factor": "latent_downscale"}


def with_todays_names(setting: Any) -> Any:
    """A loaded setting with former names of classes and settings replaced by today's, at any depth."""
    if isinstance(setting, list):
        return [with_todays_names(item) for item in setting]
    if not isinstance(setting, dict):
        return setting
    renamed = {FORMER_SETTINGS.get(name, name): with_todays_names(value) for name, value in setting.items()}
    if isinstance(path := renamed.get("class_path"), str):
        module, _, name = path.rpartition(".")
        renamed["class_path"] = f"{FORMER_MODULES.get(module, module)}.{FORMER_CLASSES.get(name, name)}".strip(".")
        arguments = renamed.get("init_args")
        if name.endswith("Inversion") and name != "GradientInversion" and "anneal" in (arguments or ()):
            arguments["prior_limit"] = arguments.pop("anneal")
    return renamed
