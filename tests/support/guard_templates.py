"""Chat templates in the forms of Llama Guard 3 and 4, written for the tests.

Both write task, categories, conversation and instructions. The first takes the content as text, the
second as parts, with the tokens of its own model's turns.
"""

from __future__ import annotations

_LINES = "S1: Violent Crimes.\\nS2: Non-Violent Crimes.\\nS10: Hate.\\n"
_TASK = (
    "{%- set role = 'User' if messages[-1]['role'] == 'user' else 'Agent' -%}"
    '{{ "Task: Check if there is unsafe content in \'" + role + "\' messages in conversations '
    "according our safety policy with the below categories.\\n\\n"
    f"<BEGIN UNSAFE CONTENT CATEGORIES>\\n{_LINES}<END UNSAFE CONTENT CATEGORIES>\\n\\n"
    '<BEGIN CONVERSATION>\\n\\n" }}'
)
_ALTERNATE = (
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{%- set name = 'User' if message['role'] == 'user' else 'Agent' -%}"
)
_END = (
    '{{ "<END CONVERSATION>\\n\\nProvide your safety assessment for ONLY THE LAST " + role + '
    "\" message in the above conversation:\\n - First line must read 'safe' or 'unsafe'.\\n - If "
    'unsafe, a second line must include a comma-separated list of violated categories." }}'
)
GUARD3 = (
    "{{ '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n' }}"
    f"{_TASK}{_ALTERNATE}"
    "{{ name + ': ' + message['content'] | trim + '\\n\\n' }}{%- endfor -%}"
    f"{_END}"
    "{{ '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
)
GUARD4 = (
    "{{ '<|begin_of_text|><|header_start|>user<|header_end|>\\n\\n' }}"
    f"{_TASK}{_ALTERNATE}"
    "{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}"
    "{{ name + ': ' + part['text'] | trim + '\\n\\n' }}{%- endfor -%}{%- endfor -%}"
    f"{_END}"
    "{{ '<|eot|><|header_start|>assistant<|header_end|>\\n\\n' }}"
)
