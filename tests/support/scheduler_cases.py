"""The configurations in which every scheduler is compared with diffusers: the product of its
options."""

from __future__ import annotations

import itertools
from typing import Any

Config = dict[str, Any]

SPACINGS = ["linspace", "leading", "trailing"]
VP = ["epsilon", "sample", "v_prediction"]
VE = ["epsilon", "v_prediction"]
BOTH = [False, True]
ENDS = ["zero", "sigma_min"]
RESPACED: list[Config] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
FLOW: list[Config] = [
    {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    for shift in (1.0, 3.0)
]


def product(**choices: list[Any]) -> list[Config]:
    """All combinations of the values of some options."""
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def times(first: list[Config], second: list[Config]) -> list[Config]:
    """All combinations of two lists of options."""
    return [a | b for a in first for b in second]


DPM = times(
    product(
        prediction_type=VP,
        solver_order=[1, 2, 3],
        algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
        solver_type=["midpoint", "heun"],
        final_sigmas_type=ENDS,
    )
    + product(
        prediction_type=VP,
        solver_order=[1, 2, 3],
        algorithm_type=["dpmsolver"],
        solver_type=["midpoint", "heun"],
        final_sigmas_type=["sigma_min"],
    ),
    RESPACED,
) + times(
    product(
        solver_order=[1, 2, 3], algorithm_type=["dpmsolver++"], solver_type=["midpoint", "heun"]
    ),
    FLOW,
)
DISTILLED = product(
    prediction_type=VP, clip_sample=BOTH, set_alpha_to_one=BOTH, rescale_betas_zero_snr=BOTH
)
EDM = product(prediction_type=VE, sigma_schedule=["karras", "exponential"], final_sigmas_type=ENDS)
FLOW_MATCH = times(
    product(shift=[1.0, 3.0], invert_sigmas=BOTH, shift_terminal=[None, 0.1]), RESPACED
)

CASES: dict[str, list[Config]] = {
    "DDIMScheduler": product(
        timestep_spacing=SPACINGS,
        prediction_type=VP,
        clip_sample=BOTH,
        thresholding=BOTH,
        set_alpha_to_one=BOTH,
        rescale_betas_zero_snr=BOTH,
    ),
    "DDIMInverseScheduler": product(
        timestep_spacing=SPACINGS[1:], prediction_type=VP, clip_sample=BOTH, set_alpha_to_one=BOTH
    ),
    "DDPMScheduler": product(
        timestep_spacing=SPACINGS,
        prediction_type=VP,
        clip_sample=BOTH,
        variance_type=["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
        beta_schedule=["linear", "squaredcos_cap_v2", "laplace", "sigmoid"],
    ),
    "PNDMScheduler": product(
        timestep_spacing=SPACINGS,
        prediction_type=VE,
        skip_prk_steps=BOTH,
        set_alpha_to_one=BOTH,
        steps_offset=[0, 1],
        beta_schedule=["linear", "scaled_linear"],
    ),
    "IPNDMScheduler": [{}],
    "LCMScheduler": times(DISTILLED, product(thresholding=BOTH)),
    "TCDScheduler": DISTILLED,
    "EulerDiscreteScheduler": times(
        product(
            timestep_spacing=SPACINGS,
            prediction_type=VP,
            interpolation_type=["linear", "log_linear"],
            timestep_type=["discrete", "continuous"],
            final_sigmas_type=ENDS,
            rescale_betas_zero_snr=BOTH,
        ),
        RESPACED,
    ),
    "EulerAncestralDiscreteScheduler": product(
        timestep_spacing=SPACINGS,
        prediction_type=VE,
        rescale_betas_zero_snr=BOTH,
        steps_offset=[0, 1],
    ),
    "LMSDiscreteScheduler": times(product(timestep_spacing=SPACINGS, prediction_type=VP), RESPACED),
    "HeunDiscreteScheduler": times(
        product(
            timestep_spacing=SPACINGS,
            prediction_type=VP,
            clip_sample=BOTH,
            beta_schedule=["linear", "exp"],
        ),
        RESPACED,
    ),
    "KDPM2DiscreteScheduler": times(
        product(timestep_spacing=SPACINGS, prediction_type=VE), RESPACED
    ),
    "KDPM2AncestralDiscreteScheduler": times(
        product(timestep_spacing=SPACINGS, prediction_type=VE), RESPACED
    ),
    "DPMSolverSDEScheduler": times(
        product(timestep_spacing=SPACINGS, prediction_type=VE, noise_sampler_seed=[3]), RESPACED
    ),
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": times(
        EDM,
        product(solver_order=[1, 2, 3], solver_type=["midpoint", "heun"])
        + product(solver_order=[1, 2], algorithm_type=["sde-dpmsolver++"]),
    ),
    "CosineDPMSolverMultistepScheduler": times(
        product(prediction_type=VE, sigma_schedule=["karras", "exponential"]),
        product(solver_order=[1, 2], solver_type=["midpoint", "heun"]),
    ),
    "CMStochasticIterativeScheduler": product(clip_denoised=BOTH, s_noise=[0.5, 1.0]),
    "DPMSolverMultistepScheduler": times(DPM, product(timestep_spacing=SPACINGS))
    + times(
        product(
            solver_order=[1, 2, 3],
            euler_at_final=BOTH,
            final_sigmas_type=ENDS,
            lower_order_final=BOTH,
        ),
        [
            {"use_lu_lambdas": True},
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
            {"thresholding": True},
        ],
    ),
    "DPMSolverMultistepInverseScheduler": times(
        product(
            timestep_spacing=SPACINGS,
            prediction_type=VP,
            solver_order=[1, 2, 3],
            algorithm_type=["dpmsolver++", "dpmsolver"],
            solver_type=["midpoint", "heun"],
        ),
        RESPACED,
    ),
    "DPMSolverSinglestepScheduler": times(DPM, product(lower_order_final=BOTH)),
    "DEISMultistepScheduler": times(
        product(timestep_spacing=SPACINGS, solver_order=[1, 2, 3], thresholding=BOTH),
        times(product(prediction_type=VP), RESPACED) + FLOW,
    ),
    "UniPCMultistepScheduler": times(
        product(
            timestep_spacing=SPACINGS,
            solver_order=[1, 2, 3],
            solver_type=["bh1", "bh2"],
            final_sigmas_type=ENDS,
        ),
        times(product(prediction_type=VP, predict_x0=BOTH), RESPACED)
        + times(FLOW, [{}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}]),
    ),
    "SASolverScheduler": times(
        product(predictor_order=[1, 2, 3], corrector_order=[1, 2, 3]),
        times(
            product(prediction_type=VP, algorithm_type=["data_prediction", "noise_prediction"]),
            RESPACED,
        )
        + FLOW,
    ),
    "FlowMatchEulerDiscreteScheduler": times(FLOW_MATCH, product(stochastic_sampling=BOTH)),
    "FlowMatchHeunDiscreteScheduler": product(shift=[1.0, 3.0]),
    "FlowMatchLCMScheduler": FLOW_MATCH,
}
