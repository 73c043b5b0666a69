"""Token goldens of eight chat template styles: prompt, chosen, rejected of four conversations.

Each control token stands in «», so that one spelled out as somebody's words is told from it. "Ġ"
and "▁" are spaces, "Ċ" and "<0x0A>" line breaks. What a golden shows beside one BOS and one EOS:

- ChatML, Zephyr and Alpaca write white space behind the end of the last turn: it is left out.
- Gemma and Phi end a turn with a token that is not the EOS: both end a completion.
- Llama-2 writes a BOS before each user's turn, so several turns have several.
- Phi's control tokens swallow the line break behind them.
- Mistral and Llama-2 answer with a space, "[/INST] yes": one, though the tokenizer would put
  another before a text of its own.
"""

from lite_orpo.data.formats.rows import PreferenceRow


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be kind"}

# user: hi, assistant: yes / no
ASKED = {
    "chatml": (
        "«<|im_start|>»userĊhi«<|im_end|>»Ċ«<|im_start|>»assistantĊ",
        "yes«<|im_end|>»",
        "no«<|im_end|>»",
    ),
    "llama2": (
        "«<s>»▁[INST]▁hi▁[/INST]",
        "▁yes▁«</s>»",
        "▁no▁«</s>»",
    ),
    "llama3": (
        (
            "«<|begin_of_text|>»«<|start_header_id|>»user«<|end_header_id|>»ĊĊhi«<|eot_id|>»"
            "«<|start_header_id|>»assistant«<|end_header_id|>»ĊĊ"
        ),
        "yes«<|eot_id|>»",
        "no«<|eot_id|>»",
    ),
    "mistral": (
        "«<s>»▁[INST]▁hi▁[/INST]",
        "▁yes«</s>»",
        "▁no«</s>»",
    ),
    "gemma": (
        ("«<bos>»«<start_of_turn>»user<0x0A>hi«<end_of_turn>»<0x0A>«<start_of_turn>»model<0x0A>"),
        "yes«<end_of_turn>»«<eos>»",
        "no«<end_of_turn>»«<eos>»",
    ),
    "phi": (
        "«<s>»«<|user|>»▁hi«<|end|>»«<|assistant|>»",
        "▁yes«<|end|>»«<|endoftext|>»",
        "▁no«<|end|>»«<|endoftext|>»",
    ),
    "zephyr": (
        "«<s>»▁<|user|><0x0A>hi«</s>»▁<0x0A><|assistant|><0x0A>",
        "yes«</s>»",
        "no«</s>»",
    ),
    "alpaca": (
        "«<|endoftext|>»###ĠInstruction:ĊhiĊĊ###ĠResponse:Ċ",
        "yes«<|endoftext|>»",
        "no«<|endoftext|>»",
    ),
}

# the same behind a system message: be kind (Gemma's template refuses one)
WITH_SYSTEM = {
    "chatml": (
        (
            "«<|im_start|>»systemĊbeĠkind«<|im_end|>»Ċ«<|im_start|>»userĊhi«<|im_end|>»Ċ"
            "«<|im_start|>»assistantĊ"
        ),
        "yes«<|im_end|>»",
        "no«<|im_end|>»",
    ),
    "llama2": (
        "«<s>»▁[INST]▁<<SYS>><0x0A>be▁kind<0x0A><</SYS>><0x0A><0x0A>hi▁[/INST]",
        "▁yes▁«</s>»",
        "▁no▁«</s>»",
    ),
    "llama3": (
        (
            "«<|begin_of_text|>»«<|start_header_id|>»system«<|end_header_id|>»ĊĊ"
            "beĠkind«<|eot_id|>»«<|start_header_id|>»user«<|end_header_id|>»ĊĊhi«<|eot_id|>»"
            "«<|start_header_id|>»assistant«<|end_header_id|>»ĊĊ"
        ),
        "yes«<|eot_id|>»",
        "no«<|eot_id|>»",
    ),
    "mistral": (
        "«<s>»▁[INST]▁be▁kind<0x0A><0x0A>hi▁[/INST]",
        "▁yes«</s>»",
        "▁no«</s>»",
    ),
    "phi": (
        "«<s>»«<|system|>»▁be▁kind«<|end|>»«<|user|>»▁hi«<|end|>»«<|assistant|>»",
        "▁yes«<|end|>»«<|endoftext|>»",
        "▁no«<|end|>»«<|endoftext|>»",
    ),
    "zephyr": (
        (
            "«<s>»▁<|system|><0x0A>be▁kind«</s>»▁<0x0A><|user|><0x0A>hi«</s>»▁<0x0A>"
            "<|assistant|><0x0A>"
        ),
        "yes«</s>»",
        "no«</s>»",
    ),
    "alpaca": (
        "«<|endoftext|>»beĠkindĊĊ###ĠInstruction:ĊhiĊĊ###ĠResponse:Ċ",
        "yes«<|endoftext|>»",
        "no«<|endoftext|>»",
    ),
}

# user: hi, assistant: you, user: how?; the chosen answer goes on for a turn of its own
SEVERAL_TURNS = {
    "chatml": (
        (
            "«<|im_start|>»userĊhi«<|im_end|>»Ċ«<|im_start|>»assistantĊyou«<|im_end|>»Ċ"
            "«<|im_start|>»userĊhow?«<|im_end|>»Ċ«<|im_start|>»assistantĊ"
        ),
        (
            "well«<|im_end|>»Ċ«<|im_start|>»userĊok«<|im_end|>»Ċ«<|im_start|>»assistantĊ"
            "bye«<|im_end|>»"
        ),
        "bad«<|im_end|>»",
    ),
    "llama2": (
        "«<s>»▁[INST]▁hi▁[/INST]▁you▁«</s>»«<s>»▁[INST]▁how?▁[/INST]",
        "▁well▁«</s>»«<s>»▁[INST]▁ok▁[/INST]▁bye▁«</s>»",
        "▁bad▁«</s>»",
    ),
    "llama3": (
        (
            "«<|begin_of_text|>»«<|start_header_id|>»user«<|end_header_id|>»ĊĊhi«<|eot_id|>»"
            "«<|start_header_id|>»assistant«<|end_header_id|>»ĊĊyou«<|eot_id|>»"
            "«<|start_header_id|>»user«<|end_header_id|>»ĊĊhow?«<|eot_id|>»"
            "«<|start_header_id|>»assistant«<|end_header_id|>»ĊĊ"
        ),
        (
            "well«<|eot_id|>»«<|start_header_id|>»user«<|end_header_id|>»ĊĊok«<|eot_id|>»"
            "«<|start_header_id|>»assistant«<|end_header_id|>»ĊĊbye«<|eot_id|>»"
        ),
        "bad«<|eot_id|>»",
    ),
    "mistral": (
        "«<s>»▁[INST]▁hi▁[/INST]▁you«</s>»▁[INST]▁how?▁[/INST]",
        "▁well«</s>»▁[INST]▁ok▁[/INST]▁bye«</s>»",
        "▁bad«</s>»",
    ),
    "gemma": (
        (
            "«<bos>»«<start_of_turn>»user<0x0A>hi«<end_of_turn>»<0x0A>«<start_of_turn>»"
            "model<0x0A>you«<end_of_turn>»<0x0A>«<start_of_turn>»user<0x0A>"
            "how?«<end_of_turn>»<0x0A>«<start_of_turn>»model<0x0A>"
        ),
        (
            "well«<end_of_turn>»<0x0A>«<start_of_turn>»user<0x0A>ok«<end_of_turn>»<0x0A>"
            "«<start_of_turn>»model<0x0A>bye«<end_of_turn>»«<eos>»"
        ),
        "bad«<end_of_turn>»«<eos>»",
    ),
    "phi": (
        (
            "«<s>»«<|user|>»▁hi«<|end|>»«<|assistant|>»▁you«<|end|>»«<|user|>»▁how?«<|end|>»"
            "«<|assistant|>»"
        ),
        "▁well«<|end|>»«<|user|>»▁ok«<|end|>»«<|assistant|>»▁bye«<|end|>»«<|endoftext|>»",
        "▁bad«<|end|>»«<|endoftext|>»",
    ),
    "zephyr": (
        (
            "«<s>»▁<|user|><0x0A>hi«</s>»▁<0x0A><|assistant|><0x0A>you«</s>»▁<0x0A>"
            "<|user|><0x0A>how?«</s>»▁<0x0A><|assistant|><0x0A>"
        ),
        "well«</s>»▁<0x0A><|user|><0x0A>ok«</s>»▁<0x0A><|assistant|><0x0A>bye«</s>»",
        "bad«</s>»",
    ),
    "alpaca": (
        (
            "«<|endoftext|>»###ĠInstruction:ĊhiĊĊ###ĠResponse:Ċyou«<|endoftext|>»ĊĊ"
            "###ĠInstruction:Ċhow?ĊĊ###ĠResponse:Ċ"
        ),
        "well«<|endoftext|>»ĊĊ###ĠInstruction:ĊokĊĊ###ĠResponse:Ċbye«<|endoftext|>»",
        "bad«<|endoftext|>»",
    ),
}

# user: say EOS now, assistant: EOS / no, where EOS is the tokenizer's EOS as somebody's words
WITH_WORDS = {
    "chatml": (
        "«<|im_start|>»userĊsayĠ<|im_end|>Ġnow«<|im_end|>»Ċ«<|im_start|>»assistantĊ",
        "<|im_end|>«<|im_end|>»",
        "no«<|im_end|>»",
    ),
    "llama2": (
        "«<s>»▁[INST]▁say▁</s>▁now▁[/INST]",
        "▁</s>▁«</s>»",
        "▁no▁«</s>»",
    ),
    "llama3": (
        (
            "«<|begin_of_text|>»«<|start_header_id|>»user«<|end_header_id|>»ĊĊ"
            "sayĠ<|eot_id|>Ġnow«<|eot_id|>»«<|start_header_id|>»assistant«<|end_header_id|>»Ċ"
            "Ċ"
        ),
        "<|eot_id|>«<|eot_id|>»",
        "no«<|eot_id|>»",
    ),
    "mistral": (
        "«<s>»▁[INST]▁say▁</s>▁now▁[/INST]",
        "▁</s>«</s>»",
        "▁no«</s>»",
    ),
    "gemma": (
        (
            "«<bos>»«<start_of_turn>»user<0x0A>say▁<eos>▁now«<end_of_turn>»<0x0A>"
            "«<start_of_turn>»model<0x0A>"
        ),
        "<eos>«<end_of_turn>»«<eos>»",
        "no«<end_of_turn>»«<eos>»",
    ),
    "phi": (
        "«<s>»«<|user|>»▁say▁<|endoftext|>▁now«<|end|>»«<|assistant|>»",
        "▁<|endoftext|>«<|end|>»«<|endoftext|>»",
        "▁no«<|end|>»«<|endoftext|>»",
    ),
    "zephyr": (
        "«<s>»▁<|user|><0x0A>say▁</s>▁now«</s>»▁<0x0A><|assistant|><0x0A>",
        "</s>«</s>»",
        "no«</s>»",
    ),
    "alpaca": (
        "«<|endoftext|>»###ĠInstruction:ĊsayĠ<|endoftext|>ĠnowĊĊ###ĠResponse:Ċ",
        "<|endoftext|>«<|endoftext|>»",
        "no«<|endoftext|>»",
    ),
}


GOLDENS = {
    "asked": (PreferenceRow([user("hi")], [assistant("yes")], [assistant("no")]), ASKED),
    "system": (
        PreferenceRow([SYSTEM, user("hi")], [assistant("yes")], [assistant("no")]),
        WITH_SYSTEM,
    ),
    "turns": (
        PreferenceRow(
            [user("hi"), assistant("you"), user("how?")],
            [assistant("well"), user("ok"), assistant("bye")],
            [assistant("bad")],
        ),
        SEVERAL_TURNS,
    ),
}


def row_with_words(eos):
    return PreferenceRow([user(f"say {eos} now")], [assistant(eos)], [assistant("no")])
