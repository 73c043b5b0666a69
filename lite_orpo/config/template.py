"""The commented configuration that `lite-orpo init` writes."""

TEMPLATE = """\
# Configuration of a lite-orpo run: `lite-orpo train {name}`.
# Any key can be overridden on the command line: `lite-orpo train {name} learning_rate=1e-4`.
# Besides these, every key of transformers.TrainingArguments is accepted.

# --- model -----------------------------------------------------------------------------------
model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct   # a folder, or a name on the hub
dtype: auto                   # what the device truly has; or float32, bfloat16, float16

# --- data ------------------------------------------------------------------------------------
# One JSON object a line with "prompt", "chosen" and "rejected": strings, or lists of
# {{"role": ..., "content": ...}} messages.
dataset_name: train.jsonl     # .jsonl, .json, .csv (or .gz), .parquet, a folder, or a hub name
# column_mapping: {{prompt: question, chosen: good, rejected: bad}}   # where names differ
# eval_dataset_name: heldout.jsonl
max_length: 1024              # tokens of prompt + completion
overlong_rows: drop           # or cut_prompt: drop the prompt's oldest tokens
on_bad_row: drop              # or error

# --- loss ------------------------------------------------------------------------------------
loss_type: orpo               # or dpo, ipo, simpo, cpo, sft
# beta: 0.1                   # orpo: weight of the odds-ratio term (the paper's lambda)
# The course's names instead of beta: orpo_alpha (strength) and orpo_beta (temperature).
# nll_tokens: prompt_and_completion   # or completion

# --- adapter ---------------------------------------------------------------------------------
use_peft: true                # false trains the whole model
lora_r: 16
lora_alpha: 32
lora_dropout: 0.0
# lora_target_modules: [q_proj, v_proj]   # default: all linear layers but the output head

# --- training --------------------------------------------------------------------------------
output_dir: runs/orpo
num_train_epochs: 1
per_device_train_batch_size: 2      # pairs
gradient_accumulation_steps: 8      # 2 x 8 = 16 pairs an optimiser step
max_tokens_per_row: 2048            # what memory goes by: tokens that pass at a time; or auto
prefix_sharing: auto                # each prompt once for both completions; or on, off
learning_rate: 5.0e-5
lr_scheduler_type: cosine
warmup_steps: 10
logging_steps: 10
eval_strategy: "no"                 # with held-out pairs also: epoch, or steps and eval_steps
save_strategy: epoch
seed: 42

# --- report ----------------------------------------------------------------------------------
sample_prompts: 3             # held-out prompts answered before and after
# sample_at_evaluations: true # and at each evaluation on the way
"""
