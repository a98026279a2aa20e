"""An agent of another framework, trained as it is: `openai-agents`, with a calculator.

    pip install openai-agents
    python examples/agent_framework.py --dataset train.jsonl

The agent knows nothing of asyncrl. Its client is given another base URL and a key; every call under the key goes to
the policy and is kept token for token, so that after the agent has ended its run can be scored and trained. Any
framework that speaks the API of OpenAI or Anthropic works the same way (docs/endpoint.md).

Rows are those of examples/gsm8k.py. The model must know tool calls in the Hermes format, as the Qwen models do.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from agents import Agent, AgentsException, OpenAIResponsesModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI, BadRequestError

import asyncrl
from asyncrl.config import LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

# The agent, as its own program would have it


@function_tool
def calculator(expression: str) -> float:
    """Work out one operation on two numbers, such as `12*34.5`.

    Args:
        expression: Two numbers with one of + - * / between them.
    """
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([-+*/])\s*(-?\d+(?:\.\d+)?)\s*", expression)
    if match is None:
        raise ValueError("expected two numbers with one of + - * / between them")
    left, right = float(match[1]), float(match[3])
    return {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or float("nan"))}[match[2]]


agent = Agent(
    name="mathematician",
    instructions="Use the calculator for every calculation. Say the final answer as a plain number in the last line.",
    tools=[calculator],
)

# Its training


@asynccontextmanager
async def make_rollout(setup: Any) -> AsyncIterator[Callable[..., Any]]:
    """One client for all rollouts, so that they share its connections; each uses it with its own key."""
    async with AsyncOpenAI(api_key="each rollout has its own") as client:

        async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
            policy = prompt.policy
            mine = client.with_options(base_url=policy.openai_base_url, api_key=policy.openai_api_key)
            model = OpenAIResponsesModel(model="policy", openai_client=mine)
            try:
                config = RunConfig(model=model, tracing_disabled=True)
                result = await Runner.run(agent, prompt["question"], run_config=config, max_turns=6)
                found = last_number(str(result.final_output))
            except (AgentsException, BadRequestError):  # too many turns, a tool that there is not, a full context
                found = None
            right = found is not None and found == last_number(str(prompt["answer"]))
            return policy.captured_run(reward=float(right), found=found)

        yield rollout


def last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--dataset", required=True, help="JSONL with question and answer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest turn")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 trains the full model")
    parser.add_argument("--sampler", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--out", help="run folder")
    options = parser.parse_args(argv)
    config = asyncrl.Config(
        model=options.model,
        run_dir=options.out,
        max_steps=options.steps,
        prompt_groups_per_step=options.prompts,
        completions_per_prompt=options.rollouts,
        sampling=SamplingConfig(max_tokens=options.max_tokens),
        lora=LoraConfig(rank=options.lora_rank),
        optimizer=OptimizerConfig(learning_rate=5e-5 if options.lora_rank else 2e-6, warmup_steps=5),
        sampler=SamplerConfig(kind=options.sampler),
    )
    return asyncrl.train(make_rollout, dataset=options.dataset, config=config)


if __name__ == "__main__":
    main()
