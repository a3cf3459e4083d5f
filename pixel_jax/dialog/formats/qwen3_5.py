"""The format of Qwen3.5: the zoom of Qwen3-VL, whose calls are written between tags.

Source: the chat template that Qwen/Qwen3.5-35B-A3B is released with, as alibaba/rtp-llm carries it
(`_QWEN35_DEFAULT_CHAT_TEMPLATE`): the system message, a line of JSON for each tool; a call, whose lists and objects are JSON
and whose other values are written as they are; and the result of a tool, in a user message between `<tool_response>` and
`</tool_response>`, each with a line of its own. The template knows no zoom: that of `qwen3_vl.py` is taken, with its boxes from
0 to 1000, for which the family's own documentation was not seen. The `<think>` with which the template opens an answer
is no part of the format.
"""

import dataclasses

from pixel_jax.dialog.formats.format import Body
from pixel_jax.dialog.formats.qwen3_vl import QWEN3_VL

SYSTEM = """# Tools

You have access to the following functions:

<tools>
{tools}
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell the user \
about function calls
</IMPORTANT>"""
QWEN3_5 = dataclasses.replace(QWEN3_VL, name="qwen3_5", body=Body.TAGS, system=SYSTEM)
