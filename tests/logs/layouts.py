"""What trainers write, in small: each layout with the same eight norms, made up."""

import json

NORMS = (1.25, 0.75, 2.5, 0.5, 3.75, 0.875, 0.625, 1.5)
ROWS = tuple(enumerate(NORMS))


def lines(text, **more):
  """One line for each norm: `{i}` is its number, `{s}` ten times that, `{x}` it."""
  made = (text.format(i=i, s=10 * i, x=x, e=i // 4 + 1, **more) for i, x in ROWS)
  return "\n".join(made) + "\n"


def objects(make):
  return "".join(json.dumps(make(i, x)) + "\n" for i, x in ROWS)


def hugging_face(values=NORMS):
  history = [
    {"epoch": i / 10, "grad_norm": x, "loss": 2.0, "step": 10 * i}
    for i, x in enumerate(values)
  ]
  history.insert(4, {"epoch": 0.4, "eval_loss": 1.9, "step": 30})
  return json.dumps({"best_metric": None, "log_history": history}, indent=2)


BAR = (
  "\r 0%|    | 0/80 [00:00<01:59, 1.05s/it]\r 5%|#   | 4/80 [00:04<01:55, 1.05s/it]\n"
)

# From a name to the file, what is in it, and the column that holds the norms.
KNOWN = {
  "transformers, its state": ("trainer_state.json", hugging_face(), "grad_norm"),
  "transformers, printed": (
    "out.log",
    "Loading\n" + lines(BAR + "{{'loss': 2.0, 'grad_norm': {x}, 'epoch': 0.{i}}}"),
    "grad_norm",
  ),
  "transformers, printed as text": (
    "out.log",
    lines("{{'loss': '2.0', 'grad_norm': '{x}', 'epoch': '0.{i}'}}"),
    "grad_norm",
  ),
  "TensorBoard, a scalar as CSV": (
    "run.csv",
    "Wall time,Step,Value\n" + lines("1748869402.{i},{s},{x}"),
    "Value",
  ),
  "TensorBoard, a scalar as JSON": (
    "run.json",
    json.dumps([[1748869402.5 + i, 10 * i, x] for i, x in ROWS]),
    "Value",
  ),
  "Lightning, with epochs": (
    "metrics.csv",
    "epoch,step,train/grad_norm_epoch,train/grad_norm_step\n"
    + lines("{e},{s},,{x}")
    + "2,70,1.4,\n",
    "train/grad_norm_step",
  ),
  "Megatron": (
    "run.out",
    "setting number of micro-batches to constant 32\n"
    + lines(
      " iteration  {s}/  1000 | consumed samples:  1024 | elapsed time per iteration"
      " (ms): 144915.6 | learning rate: 1.8E-04 | loss scale: 64.0 | grad norm: {x} |"
      " number of skipped iterations:   0 | number of nan iterations:   0 |"
    ),
    "grad norm",
  ),
  "build-nanogpt": (
    "log.txt",
    "total batch size: 524288\n"
    + lines("step  {i} | loss: 9.9 | lr 6.0e-05 | norm: {x} | dt: 380.00ms"),
    "norm",
  ),
  "torchtitan, in colours": (
    "log.txt",
    lines(
      "[rank0]:[titan] 2025-10-30 20:19:10,736 - root - INFO - \x1b[31mstep: {s} "
      " \x1b[32mloss:  8.0  \x1b[38;2;180;60;0mgrad_norm:  {x}  \x1b[4mtps: 1,222\x1b[m"
    ),
    "grad_norm",
  ),
  "verl": (
    "log.txt",
    lines(
      "step:{i} - global_seqlen/min:238933 - actor/grad_norm:np.float64({x}) -"
      " actor/lr:np.float64(1e-06) - training/global_step:{i}"
    ),
    "actor/grad_norm",
  ),
  "fairseq, JSON behind a prefix": (
    "train.log",
    "[2022-04-08 18:40:05,372][fairseq_cli.train][INFO] - {'_name': None}\n"
    + lines(
      "[2022-04-08 18:40:05,372][train_inner][INFO] - "
      '{{"epoch": 1, "update": 0.{i}, "num_updates": "{s}", "gnorm": "{x}"}}'
    ),
    "gnorm",
  ),
  "fairseq, simple": (
    "train.log",
    lines(
      "2021-01-01 10:00:00 | INFO | train_inner | epoch 001:     {s} / 100 loss=9.0,"
      " gnorm={x}, num_updates={s}, lr=0.001, wall=90"
    ),
    "gnorm",
  ),
  "logger of OpenAI, its tables": (
    "log.txt",
    "Logging to logs\n"
    + lines("-----------\n| grad_norm | {x} |\n| loss      | 0.2 |\n| step | {s} |"),
    "grad_norm",
  ),
  "clu": (
    "log.txt",
    lines(
      "I0307 01:20:17.7757 1400 logging_writer.py:48] [{s}] global_step={s},"
      " grad_norm={x}, loss=6.9"
    ),
    "grad_norm",
  ),
  "RLlib, dictionaries in cells": (
    "progress.csv",
    "info,training_iteration,episode_reward_mean\n"
    + lines("\"{{'learner': {{'grad_gnorm': {x}, 'var_gnorm': 10.1{i}}}}}\",{i},nan"),
    "grad_gnorm",
  ),
  "RLlib, its results": (
    "result.json",
    objects(
      lambda i, x: {
        "info": {"learner": {"grad_gnorm": x, "var_gnorm": 10 + i}},
        "training_iteration": i,
      }
    ),
    "info/learner/grad_gnorm",
  ),
  "CSV of tensors": (
    "run.csv",
    "iteration,original_grad_norm\n" + lines("{i},\"tensor({x}, device='cuda:0')\""),
    "original_grad_norm",
  ),
  "AlgoPerf, more evaluations than steps": (
    "measurements.csv",
    "global_step,grad_norm,score\n" + lines("{s},{x},\n{s}1,,0.5\n{s}2,,0.5"),
    "grad_norm",
  ),
  "MLflow, its store": ("grad_norm", lines("171700000{i}000 {x} {s}"), "value"),
}

# Those that hold no norm of a step, or several: what the one line says.
REFUSED = {
  "LLaMA-Factory": (
    "trainer_log.jsonl",
    objects(lambda i, x: {"current_steps": i, "total_steps": 80, "loss": x}),
    "trainer_state.json",
  ),
  "wandb, a table of runs": (
    "runs.csv",
    '"Name","State","train_cfg.algorithm.max_grad_norm","Train/mean_reward"\n'
    + lines('"run_{i}","finished","{x}","2{i}.5"'),
    "It is a table of runs",
  ),
  "Coqui, two optimizers": (
    "log.txt",
    lines(
      "\n   --> TIME: 2023-06-15 10:00:11 -- STEP: {i}/492 -- GLOBAL_STEP: 1000{s}\n"
      "     | > grad_norm_0: {x}  (1.9)\n     | > grad_norm_1: {x}  (1.9)"
    ),
    "2 columns look like",
  ),
  "norms of two players": (
    "run.csv",
    "step,defend_grad_norm,attack_grad_norm\n" + lines("{i},{x},1{x}"),
    "'defend_grad_norm', 'attack_grad_norm'",
  ),
  "a norm for each parameter": (
    "log.txt",
    lines("proj.{i}.weight:\n  weight_norm_before: 12.9\n  grad_norm: {x}"),
    "norms of parts, not of steps",
  ),
  "GNMT, at overflows only": (
    "log.txt",
    lines("0: TRAIN [0][{s}/2259]\tTime 0.09 (0.10)\tLoss/tok {x} (9.9)\tLR 8e-05")
    + "0: Gradient norm: inf\n",
    "never finite",
  ),
  "norms after a clip that always acted": (
    "run.csv",
    "step,grad_norm\n" + "".join(f"{i},3.0\n" for i in range(200)),
    "'grad_norm' is constant",
  ),
}

# Further layouts, of which more or less is known from what their authors publish.
FURTHER = {
  "mmcv": (
    "log.txt",
    lines(
      "2021-11-22 01:32:34,502 - mmocr - INFO - Epoch [1][{s}/62598]\tlr: 1.000e-03,"
      " eta: 7 days, 15:55:58, time: 0.705, memory: 7239, loss: 0.9, grad_norm: {x}"
    ),
    "grad_norm",
  ),
  "mmengine, JSON": (
    "scalars.json",
    '{"env_info": "Python", "seed": 0}\n'
    + objects(
      lambda i, x: {"mode": "train", "epoch": i // 4 + 1, "iter": i % 4, "grad_norm": x}
    ),
    "grad_norm",
  ),
  "Swin Transformer": (
    "log.txt",
    lines(
      "[2022-01-01 10:00:00 swin](main.py 242): INFO Train: [0/300][{s}/1251]\teta"
      " 0:10:00 lr 0.000001\t time 0.5 (0.6)\tloss 6.9 (6.9)\tgrad_norm {x} (inf)"
    ),
    "grad_norm",
  ),
  "Marian": (
    "train.log",
    lines(
      "[2020-01-01 10:00:00] Ep. 1 : Up. {s} : Sen. 12,345 : Cost 5.1 * 1,234 @ 56"
      " after 12,345 : Time 12.3s : 1234.5 words/s : gNorm {x}"
    ),
    "gNorm",
  ),
  "llm.c": (
    "main.log",
    lines(
      "step  {i}/19560 | loss 11.0 (+nanz)| norm {x} (+nanz)| lr 8.57e-07 | 3200.1 ms"
    ),
    "norm",
  ),
  "Composer": (
    "log.txt",
    lines("[batch={i}/100]:\n\t Train l2_norm/grad/global: {x}\n\t Train loss: 2.0"),
    "Train l2_norm/grad/global",
  ),
  "torchtune": (
    "log.txt",
    lines("Step {i} | loss:1.5 lr:2e-05 tokens_per_second_per_gpu:123 grad_norm:{x}"),
    "grad_norm",
  ),
  "InternLM": (
    "log.txt",
    lines(
      "2023-07-07 12:26:58,293\tINFO train.py:323 in record -- step={i}, loss=6.3,"
      " tgs=188.8, lr=1.0e-06, loss_scale=64.0, grad_norm={x}, micro_num=4"
    ),
    "grad_norm",
  ),
  "MaxText": (
    "metrics.txt",
    objects(
      lambda i, x: {
        "step": float(i),
        "learning/grad_norm": min(x, 1.0),
        "learning/raw_grad_norm": x,
        "learning/param_norm": 50.0 + i,
      }
    ),
    "learning/raw_grad_norm",
  ),
  "OLMo": (
    "log.txt",
    lines(
      "2024-01-01 10:00:00\tnode:0\tolmo.train:967\tINFO\t[step={i}/1000,epoch=0]\n"
      "    optim/total_grad_norm={x}\n    train/CrossEntropyLoss=11.3"
    ),
    "optim/total_grad_norm",
  ),
  "Stable-Baselines": (
    "log.txt",
    lines(
      "-----------------\n| train/      |      |\n|    grad_norm | {x} |\n|"
      "    loss  | 0.2 |\n| time/ | |\n|    iterations | {i} |"
    ),
    "grad_norm",
  ),
  "a table of Markdown": (
    "run.md",
    "| step | loss | grad_norm |\n|---|---|---|\n" + lines("| {i} | 2.0 | {x} |"),
    "grad_norm",
  ),
  "wandb, a run's history": (
    "history.jsonl",
    objects(lambda i, x: {"_step": i, "_runtime": 1.5 * i, "train/grad_norm": x}),
    "train/grad_norm",
  ),
  "wandb, a chart of one run": (
    "wandb_export.csv",
    '"Step","a-1 - train/grad_norm","a-1 - train/grad_norm__MIN",'
    '"a-1 - train/grad_norm__MAX"\n' + lines('"{i}","{x}","{x}","{x}"'),
    "a-1 - train/grad_norm",
  ),
  "MLflow, from its server": (
    "history.json",
    json.dumps(
      {
        "metrics": [
          {"key": "grad_norm", "value": x, "timestamp": 1_717_000_000_000, "step": i}
          for i, x in ROWS
        ]
      }
    ),
    "grad_norm",
  ),
  "names and values in columns": (
    "metrics.csv",
    "run_id,key,value,step\n" + lines("a1,loss,2.0,{i}\na1,grad_norm,{x},{i}"),
    "grad_norm",
  ),
  "pandas, JSON": (
    "run.json",
    json.dumps(
      {
        "step": {str(i): i for i, _ in ROWS},
        "grad_norm": {str(i): x for i, x in ROWS},
      }
    ),
    "grad_norm",
  ),
  "Keras, a history": (
    "history.json",
    json.dumps({"loss": [2.0] * len(NORMS), "grad_norm": NORMS, "params": {}}),
    "grad_norm",
  ),
  "ms-swift": (
    "logging.jsonl",
    objects(
      lambda i, x: {"loss": 2.0, "grad_norm": x, "global_step/max_steps": f"{i}/80"}
    ),
    "grad_norm",
  ),
  "ESPnet": (
    "train.log",
    lines(
      "[host] 2021-01-01 10:00:00,123 (trainer:653) INFO: 1epoch:train:{s}-{s}9batch:"
      " iter_time=0.001, forward_time=0.1, loss=55.2, grad_norm={x}, optim0_lr0=2.0e-06"
    ),
    "grad_norm",
  ),
  "containers, JSON": (
    "pod.log",
    objects(
      lambda i, x: {"log": f"step {i}: loss 2.0, grad_norm: {x}\n", "stream": "stdout"}
    ),
    "grad_norm",
  ),
  "a notebook": (
    "train.ipynb",
    json.dumps(
      {
        "cells": [
          {"cell_type": "markdown", "source": ["grad_norm: 99"]},
          {
            "cell_type": "code",
            "source": ["train()"],
            "outputs": [
              {
                "name": "stdout",
                "text": lines("{i}. step {i} grad norm: {x}").splitlines(1),
              }
            ],
          },
        ]
      }
    ),
    "grad norm",
  ),
  "a spreadsheet with decimal commas": (
    "run.csv",
    "step;grad_norm\n" + lines("{i};{x}").replace(".", ","),
    "grad_norm",
  ),
  "numpy.savetxt with names": (
    "run.txt",
    "# step grad_norm\n" + lines("{i}.0e+00 {x}"),
    "grad_norm",
  ),
  "pandas, printed": (
    "run.txt",
    "   step  loss  grad_norm\n" + lines("{i} {i} 2.0 {x}"),
    "grad_norm",
  ),
  "nanotron": (
    "log.txt",
    lines(
      "01/01/2024 10:00:00 [INFO|DP=0|PP=0|TP=0]: iteration: {i} / 15 |"
      " consumed_tokens: 1.02K | tokens_per_sec: 323K | lm_loss: 10.6 | grad_norm: {x}"
    ),
    "grad_norm",
  ),
  "logfmt": (
    "log.txt",
    lines('level=info ts=2025-01-01T00:00:00Z msg="train" step={i} grad_norm={x}'),
    "grad_norm",
  ),
  "YAML": ("run.yaml", lines("- step: {i}\n  grad_norm: {x}"), "grad_norm"),
  "TensorFlow 1": (
    "log.txt",
    lines(
      "INFO:tensorflow:global_norm/gradient_norm = {x}, loss = 2.0, step = {s} (3 sec)"
    ),
    "global_norm/gradient_norm",
  ),
  "Optim.jl": (
    "log.txt",
    "Iter     Function value   Gradient norm\n"
    + lines("     {i}     2.42e+01     {x}"),
    "Gradient norm",
  ),
}
