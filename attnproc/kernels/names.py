"""diffusers' names of backends for what has a name of its own here."""

__all__ = ["ALIASES"]

ALIASES = {
    "native": "sdpa",
    "_native_flash": "flash_sdpa",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "_native_math": "math",
    "_native_npu": "npu",
    "_native_xla": "xla",
    "flash_varlen": "flash",
    "_flash_3": "flash3",
    "_flash_varlen_3": "flash3",
    "flash_varlen_hub": "flash_hub",
    "_flash_3_hub": "flash3_hub",
    "_flash_3_varlen_hub": "flash3_hub",
    "flash_4_hub": "flash4_hub",
    "_sage_qk_int8_pv_fp8_cuda": "sage_fp8",
    "_sage_qk_int8_pv_fp8_cuda_sm90": "sage_fp8_sm90",
    "_sage_qk_int8_pv_fp16_cuda": "sage_fp16",
    "_sage_qk_int8_pv_fp16_triton": "sage_triton",
}
