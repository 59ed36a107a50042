"""Models of openmythos in vLLM; see README.md.

vLLM calls `register` in each of its processes, possibly twice.
"""


def register() -> None:
    """Make the config, the model and its checks known to vLLM."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from openmythos.hub.export_config import OpenMythosConfig
    from openmythos_vllm.checks import CheckedConfig

    AutoConfig.register("openmythos", OpenMythosConfig, exist_ok=True)
    name = "OpenMythosForCausalLM"
    # As text, so that only the process that runs the model imports it.
    ModelRegistry.register_model(name, f"openmythos_vllm.model:{name}")
    MODELS_CONFIG_MAP[name] = CheckedConfig
