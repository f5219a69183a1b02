"""All checks by name, and their run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dinoengine.evaluation.numerics import inputs, layers, libraries, objective, recipe
from dinoengine.evaluation.numerics.quantity import Quantity

CHECKS: dict[str, Callable[[], Iterator[Quantity]]] = {
    "sizes": recipe.check_sizes,
    "schedules": recipe.check_schedules,
    "groups": recipe.check_param_groups,
    "weights": objective.check_loss_weights,
    "start": objective.check_first_losses,
    "targets": objective.check_targets,
    "losses": objective.check_koleo_and_ibot,
    "teacher": objective.check_teacher,
    "positions": layers.check_positions,
    "depth": layers.check_stochastic_depth,
    "masks": inputs.check_masks,
    "blur": inputs.check_blur,
    "timm": libraries.check_timm,
    "transformers": libraries.check_transformers,
}


def run_checks(names: Iterable[str] | None = None) -> list[Quantity]:
    """The quantities of these checks (default: all), in order. A check that raises gives a failed one; others go on.

    Raises:
        ValueError: if there is no check of a name.
    """
    chosen = list(CHECKS if names is None else names)
    unknown = [name for name in chosen if name not in CHECKS]
    if unknown:
        raise ValueError(f"There is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}.")
    quantities: list[Quantity] = []
    for name in chosen:
        try:
            quantities += CHECKS[name]()
        except Exception as error:  # whatever it is, it is a result of this check and must not hide the others'
            note = f"{type(error).__name__}: {error}".splitlines()[0]
            quantities.append(Quantity(f"check {name}", "runs to its end", 0.0, None, note=note))
    return quantities
