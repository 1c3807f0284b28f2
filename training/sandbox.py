"""The other side of `training.templates.render`: a process that renders a Jinja chat template and can be ended.

Owns: the sandbox and its limits. Must not know: anything of this project; it runs alone, with jinja2 and nothing else.

Reads one JSON object (`template`, `names`, `conversations`, `seconds`, `characters`, `bytes`) from standard input and writes
one: `texts`, or `error` and `row`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Slow(BaseException):
    pass


def _too_slow(number, frame):
    raise _Slow


def _refuse(message):
    raise TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(asked: dict) -> dict:
    """Returns the texts of all conversations, or what is wrong with the first that has none."""
    # The same environment as transformers.utils.chat_template_utils, so that a template means the same here and there.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    row, texts = 0, []
    signal.signal(signal.SIGALRM, _too_slow)
    try:
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        template = environment.from_string(asked["template"])
        for row, messages in enumerate(asked["conversations"]):
            signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
            parts, length = [], 0
            for part in template.generate(messages=messages, add_generation_prompt=True, tools=None, **asked["names"]):
                parts.append(part)
                length += len(part)
                if length > asked["characters"]:
                    return {"error": f"writes more than {asked['characters']:,} characters.", "row": row}
            texts.append("".join(parts))
    except _Slow:
        return {"error": f"takes more than {asked['seconds']:g} s.", "row": row}
    except MemoryError:
        return {"error": "takes too much memory.", "row": row}
    except (
        TemplateError,
        OverflowError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:
        return {"error": f"fails: {str(e)[:200] or type(e).__name__}", "row": row}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"texts": texts}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (given["bytes"], given["bytes"]))
    # What Python and jinja2 load late is loaded by a template that uses it and then fails: no file can be opened from now on.
    late = r"{{ 'a\n' | trim | upper | title }}{{ [1] | tojson }}{{ raise_exception('') }}"
    render(given | {"template": late, "conversations": [[]]})
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    json.dump(render(given), sys.stdout)
