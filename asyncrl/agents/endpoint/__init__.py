"""The server that any agent program can use as its model: the APIs of OpenAI and Anthropic in front of the policy."""

from asyncrl.agents.endpoint.server import Endpoint

__all__ = ["Endpoint"]
