"""Clients that know nothing of us: a LangChain tool agent, and gRPC by reflection alone."""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tokenizers import Tokenizer

from arriero.router import templates
from arriero.router.gateway import GatewayConfig
from arriero.shards.engine.types import EngineRequest
from support.frontdoor import LLAMA3, echo, make_card, serve

CONFIG = GatewayConfig(http_address="127.0.0.1:0", models=("tiny",))
TEMPLATE = resources.files(templates).joinpath("llama3.1.jinja").read_text()


async def test_langchain_tool_agent(llama_tokenizer: Tokenizer) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return f"sunny in {city}"

    texts = ('{"name": "get_weather", "parameters": {"city": "La Paz"}}', "It is sunny.")
    spoken = [llama_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def policy(request: EngineRequest, index: int, position: int) -> int:
        answered = "sunny in La Paz" in llama_tokenizer.decode(request.prompt)
        words = spoken[answered]
        return words[position] if position < len(words) else 1

    card = make_card(llama_tokenizer, TEMPLATE, max_model_len=4096)
    async with serve(card, policy, config=CONFIG) as stack:
        model = ChatOpenAI(
            model="tiny",
            base_url=f"http://127.0.0.1:{stack.gateway.http_port}/v1",
            api_key="none",  # type: ignore[arg-type]
            max_retries=0,
        ).bind_tools([get_weather])
        for streamed in (False, True):
            talk: list[Any] = [HumanMessage("How is the weather in La Paz?")]
            for _ in range(4):
                if streamed:
                    parts = [part async for part in model.astream(talk)]
                    answer: Any = parts[0]
                    for part in parts[1:]:
                        answer += part
                else:
                    answer = await model.ainvoke(talk)
                talk.append(answer)
                if not answer.tool_calls:
                    break
                for call in answer.tool_calls:
                    said = get_weather.invoke(call["args"])
                    talk.append(ToolMessage(said, tool_call_id=call["id"]))
            assert talk[-1].content == "It is sunny."
            assert [type(one).__name__ for one in talk].count("ToolMessage") == 1


async def test_grpc_by_reflection_alone(llama_tokenizer: Tokenizer) -> None:
    async with serve(make_card(llama_tokenizer, LLAMA3), echo, config=CONFIG) as stack:

        def ask() -> str:
            with grpc.insecure_channel(stack.address) as channel:
                pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
                method = pool.FindServiceByName("arriero.v1.Inference").methods_by_name["Generate"]
                call = channel.unary_stream(
                    "/arriero.v1.Inference/Generate",
                    request_serializer=GetMessageClass(method.input_type).SerializeToString,
                    response_deserializer=GetMessageClass(method.output_type).FromString,
                )
                request = GetMessageClass(method.input_type)(text="llamas carry packs")
                return "".join(o.text for answer in call(request) for o in answer.outputs)

        assert "llamas carry packs" in await asyncio.to_thread(ask)
