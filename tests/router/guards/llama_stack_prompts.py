"""Llama Stack's prompts for Llama Guard.

Usage: llama_stack_prompts.py MODEL CONVERSATIONS; the conversations are JSON: lists of [role,
text]. Prints the prompts as a JSON list.
"""

from __future__ import annotations

import json
import sys

from llama_stack.apis.inference import CompletionMessage, UserMessage
from llama_stack.models.llama.datatypes import StopReason
from llama_stack.providers.inline.safety.llama_guard.llama_guard import LlamaGuardShield

model, conversations = sys.argv[1], json.loads(sys.argv[2])
shield = LlamaGuardShield(model, inference_api=None)
prompts = []
for conversation in conversations:
    messages = [
        UserMessage(content=text)
        if role == "user"
        else CompletionMessage(content=text, stop_reason=StopReason.end_of_turn)
        for role, text in conversation
    ]
    prompts.append(shield.build_prompt(messages))
print(json.dumps(prompts))
