"""Slow twins of the rules on eight-bit floats."""

from __future__ import annotations

import numpy as np
from twins import dense, twin

from crossvjp import Overwrite
from crossvjp.rules import DelayedScale, Fp8DelayedScaling

E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of the mantissa, the smallest exponent, the largest number


def nearest(numbers, kind):
    """Rounds to the nearest number of a format, one by one; ties go to the even one, as in `round`."""
    bits, least, top = kind

    def one(number):
        number = min(max(float(number), -top), top)
        exponent = max(np.floor(np.log2(abs(number))), least) if number else least
        step = 2.0 ** (exponent - bits)
        return round(number / step) * step

    return np.reshape([one(number) for number in np.ravel(numbers)], np.shape(numbers))


def q(numbers, seen, kind):
    """Scales by what was seen, rounds, scales back; and what there is to tell after it."""
    history = np.asarray(seen.amax_history.value, np.float64)
    scale = max(history) / kind[2] if max(history) else float(seen.scale.value)
    told = np.array([np.abs(numbers).max(), *history[2:], history[0]])  # the oldest stands second
    return scale * nearest(numbers / scale, kind), ((scale, 1.0), (told, 1.0))


def seen(scale, *history):
    return DelayedScale(Overwrite(np.array(scale)), Overwrite(np.array(history)))


SEEN = {"input": seen(1.0, 1.5, 0.0, 0.7), "kernel": seen(1.0, 0.3, 0.9, 0.1), "output_grad": seen(1.0, 40.0, 9.0, 1.0)}
NOTHING = {name: seen(0.01, 0.0, 0.0, 0.0) for name in SEEN}


def fp8_cotangents(case, x, w):
    rule = case.rule
    q_x, of_x = q(x, rule.input, E4M3)
    q_w, of_w = q(w, rule.kernel, E4M3)
    q_y_bar, of_y_bar = q(case.y_bar, rule.output_grad, E5M2)
    told = {"input": of_x, "kernel": of_w, "output_grad": of_y_bar}
    return q_x @ q_w, q_y_bar @ q_w.T, q_x.T @ q_y_bar, told


@twin(Fp8DelayedScaling(**SEEN))
@twin(Fp8DelayedScaling(**NOTHING))
def fp8_of_a_dense_layer(case):
    product, x_bar, w_bar, told = fp8_cotangents(case, case.inputs[0], case.variables["w"])
    return product + case.variables["b"], (x_bar,), {"w": w_bar, "b": case.y_bar.sum(0)}, told


@twin(
    Fp8DelayedScaling(**SEEN),
    fn=lambda p, x, w: dense({"w": w, "b": 0.0}, x),
    inputs=(np.linspace(-2, 1.3, 12).reshape(4, 3), np.linspace(-0.4, 0.5, 6).reshape(3, 2)),
)
def fp8_of_a_product(case):
    y, x_bar, w_bar, told = fp8_cotangents(case, *case.inputs)
    return y, (x_bar, w_bar), {}, told
