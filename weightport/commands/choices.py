"""What several commands offer as choices."""

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner", "upscaler")
COMPONENTS = (
    "unet",
    "text_encoder",
    "text_encoder_2",
    "vae",
    "decoder",
    "image_encoder",
    "controlnet",
)
