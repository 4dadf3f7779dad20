"""
What happens to a first gradient that says nothing, in the released implementations of SGD-SaI and in this one; AdamW
stands beside them for what is usual.

    python benchmarks/first_step.py          # a quarter of a minute

Every cell is what an implementation did here, not what is said of it. Writes `benchmarks/results/first_step.json` and
`.md`. Implementations that are not installed are left out, and said so.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from common import command, machine, markdown_table, write_results
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sai


Make = Callable[..., torch.optim.Optimizer]


def implementations() -> dict[str, Make]:
    """Constructors that take `params` and options, by name."""
    found: dict[str, Make] = {"hf_sai": hf_sai.SGDSaI}
    try:
        from sgd_sai import SGD_sai

        found["sgd-sai"] = SGD_sai
    except ImportError:
        print("sgd-sai is not installed: left out")
    try:
        from pytorch_optimizer import SGDSaI

        found["pytorch-optimizer"] = SGDSaI
    except ImportError:
        print("pytorch-optimizer is not installed: left out")
    return {**found, "AdamW": torch.optim.AdamW}


def lora_factors_that_train(make: Make) -> str:
    """Adapter matrices that moved in 20 steps, of a tiny Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules="all-linear"))
    adapter = {name: param for name, param in model.named_parameters() if param.requires_grad}
    before = {name: param.detach().clone() for name, param in adapter.items()}
    optimizer = make(list(adapter.values()), lr=0.05, weight_decay=0.0)
    tokens = torch.randint(0, 32, (4, 12))
    for _ in range(20):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {
        factor: sum(not torch.equal(before[name], adapter[name]) for name in adapter if factor in name)
        for factor in ("lora_A", "lora_B")
    }
    of = len(adapter) // 2
    return f"A {moved['lora_A']} of {of}, B {moved['lora_B']} of {of}"


def one_bad_batch(make: Make) -> str:
    """A gradient with one inf, and then ordinary ones."""
    param = steps(make, [[float("inf"), 1.0, 2.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    return "trains on" if param.isfinite().all() and param[0] != 0.0 else "weights are NaN"


def a_gradient_that_comes_late(make: Make) -> str:
    """A tensor without a gradient in step 1, beside one that has it."""
    first, late = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = make([first, late], lr=0.01, weight_decay=0.0)
    for step in range(2):
        first.grad = torch.tensor([1.0, 2.0, 4.0])
        late.grad = torch.tensor([1.0, 2.0, 4.0]) if step else None
        optimizer.step()
    return "trains" if bool((late != 0).all()) else "does not train"


def a_scalar(make: Make) -> str:
    """How far one step at learning rate 0.01 moves a tensor of one element whose gradient is 0.5."""
    param = steps(make, [[0.5]])
    return f"moves by {abs(param.item()):.3g}"


def a_constant_gradient(make: Make) -> str:
    """The same for three equal gradients of 0.5."""
    param = steps(make, [[0.5, 0.5, 0.5]])
    return f"moves by {param.abs().max().item():.3g}"


def resumed(make: Make) -> str:
    """The largest difference of the weights after a save, a load into a new optimizer, and five more steps."""
    torch.manual_seed(0)
    gradients = [torch.randn(8, 8) + step for step in range(6)]
    whole, part = (torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2))
    optimizer, saved = (make([param], lr=0.01, weight_decay=0.0) for param in (whole, part))
    optimizer_step(optimizer, whole, gradients[0])
    optimizer_step(saved, part, gradients[0])
    state = copy.deepcopy(saved.state_dict())
    saved = make([part], lr=0.01, weight_decay=0.0)
    saved.load_state_dict(state)
    for gradient in gradients[1:]:
        optimizer_step(optimizer, whole, gradient)
        optimizer_step(saved, part, gradient)
    difference = (whole - part).abs().max().item()
    return "equal to the bit" if difference == 0 else f"differs by {difference:.2g}"


def without_momentum(make: Make) -> str:
    """`momentum=0`."""
    if make is torch.optim.AdamW:
        return "no such option"
    param = steps(make, [[1.0, 2.0, 4.0]], momentum=0.0)
    return "works" if param[0] != 0 else "does not train"


def calls_of_the_closure(make: Make) -> str:
    """In the first step."""
    param, calls = torch.nn.Parameter(torch.ones(3)), []
    optimizer = make([param], lr=0.01)

    def closure() -> torch.Tensor:
        calls.append(1)
        param.grad = torch.tensor([1.0, 2.0, 4.0])
        return param.sum()

    optimizer.step(closure)
    return str(len(calls))


def a_gradient_of_a_thousandth(make: Make) -> str:
    """Ratio of the first updates of a vector for a gradient and the same divided by 1,000: the scale knows no size."""
    moved = [steps(make, [[x, 2 * x, 4 * x]])[2].item() / x for x in (1.0, 1e-3)]
    return f"{moved[1] / moved[0]:.3g}"


def steps(make: Make, gradients: list[list[float]], **options: Any) -> torch.Tensor:
    """A tensor of zeros after steps with these gradients."""
    param = torch.nn.Parameter(torch.zeros(len(gradients[0])))
    optimizer = make([param], lr=0.01, weight_decay=0.0, **options)
    for gradient in gradients:
        optimizer_step(optimizer, param, torch.tensor(gradient))
    return param.detach()


def optimizer_step(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """One step with a gradient of its own."""
    param.grad = gradient.clone()
    optimizer.step()


CASES: dict[str, Callable[[Make], str]] = {
    "LoRA: factors that train in 20 steps": lora_factors_that_train,
    "inf in the first gradient": one_bad_batch,
    "first gradient in step 2": a_gradient_that_comes_late,
    "one element, gradient 0.5, lr 0.01": a_scalar,
    "three equal gradients of 0.5, lr 0.01": a_constant_gradient,
    "saved, loaded, continued": resumed,
    "`momentum=0`": without_momentum,
    "calls of the closure in step 1": calls_of_the_closure,
    "first update of a vector per unit of its gradient: gradient / 1000 against gradient": a_gradient_of_a_thousandth,
}


def outcome(case: Callable[[Make], str], make: Make) -> str:
    """What a case gives, or the error that it ends with."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # one of them prints a banner
            return case(make)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    """Runs every case on every implementation, and writes the result files."""
    found = implementations()
    outcomes = {title: {name: outcome(case, make) for name, make in found.items()} for title, case in CASES.items()}
    about = machine("sgd-sai", "pytorch-optimizer", "transformers", "peft")
    names = [f"{name} {about['versions'][name]}" if "-" in name else name for name in found]
    rows = [[title, *(cells[name] for name in found)] for title, cells in outcomes.items()]
    table = markdown_table(["case", *names], rows)
    print(table)
    title = "What each implementation did with a first gradient that says nothing, or not yet."
    write_results(
        "first_step", {"machine": about, "command": command(__file__, []), "outcomes": outcomes}, f"{title}\n\n{table}"
    )


if __name__ == "__main__":
    main()
