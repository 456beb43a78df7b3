"""Source mutants of what a run starts from and goes on with: weights, checkpoints, data."""

# ruff: noqa: E501 - the text of a line is a line

from __future__ import annotations

from benchmarks.source_mutants import (
    EMULATED,
    STATE,
    TESTS,
    UNUSUAL,
    SourceMutant,
    mutants_of,
)

VALUES = f"{TESTS}/test_initial_values.py"
RANKS = f"{TESTS}/test_checkpoint_ranks.py"
CHECKPOINT = f"{TESTS}/test_checkpoint.py"
LOAD = f"{TESTS}/test_checkpoint_load.py"
BATCHES = f"{TESTS}/test_data_batches.py"
TOKENS = f"{TESTS}/test_data_tokens.py"
MESH = f"{TESTS}/test_mesh.py"
EXPERTS = f"{TESTS}/test_expert_storage.py"
DATA = f"{TESTS}/test_data.py"

VALUE_MUTANTS = [
    *mutants_of(
        "initial_values.py",
        (VALUES,),
        ("all modules draw the same numbers", "_hash(self._seed, path)", '_hash(self._seed, "")'),
        ("all seeds draw the same numbers", "_hash(self._seed, path)", "_hash(0, path)"),
        (
            "the caller's generator moves",
            "with torch.random.fork_rng(devices=[]), torch",
            "with torch",
        ),
        (
            "modules do not reset themselves",
            "                reset_parameters()\n",
            "                pass\n",
        ),
        (
            "the model's own rule is not asked",
            "                init_weights(owner)\n",
            "                pass\n",
        ),
        (
            "only the module itself is asked",
            "                if not parts:\n",
            "                if True:\n",
        ),
        ("what nobody wrote is taken", "if not _is_written(value):", "if False:"),
        (
            "every rank has the first part",
            "return variable.layout.cut(full, place)",
            "return variable.layout.cut(full, Place(place.sizes, dict.fromkeys(place.sizes, 0)))",
        ),
        (
            "every rank draws the first rows",
            "start += rows * place.ranks[axis]",
            "start += 0",
        ),
        ("drawn values keep their dtype", "return part.to(variable.dtype)", "return part"),
    ),
    *mutants_of(
        "materialize.py",
        (VALUES, EMULATED),
        ("frozen weights are trained", "requires_grad=meta.requires_grad)", "requires_grad=True)"),
        (
            "the user's tensors are trained",
            "torch.empty(part.shape, dtype=part.dtype, device=mesh.device).copy_(part)",
            "part",
        ),
        ("shared tensors are filled once", "in places[id(meta)]:", "in places[id(meta)][:1]:"),
        ("another shape is taken", "if value.shape != meta.shape:", "if False:"),
        ("a tensor on meta is left", "        if tensor.is_meta:\n", "        if False:\n"),
    ),
    *mutants_of(
        "state.py",
        (STATE,),
        (
            "rank 0 alone is loaded",
            "            dist.broadcast(value, src=0, group=mesh.group)\n",
            "            pass\n",
        ),
        ("names are not checked", "if set(full) != set(names):", "if False:"),
        ("tied values may differ", "if name != variable.name and not", "if False and not"),
    ),
    *mutants_of(
        "parallel.py",
        (STATE,),
        (
            "buffers are not loaded",
            "state.load_full(full, self._saved(),",
            "state.load_full(full, [v for v in self._saved() if v.is_parameter],",
        ),
        (
            "buffers are not in a state dict",
            "return variable.is_parameter or variable.persistent",
            "return variable.is_parameter",
        ),
        (
            "aliases are not in a state dict",
            "for alias in (v.name, *v.aliases)}",
            "for alias in (v.name,)}",
        ),
    ),
    *mutants_of(
        "mesh.py",
        (MESH,),
        (
            "tp and dp are exchanged",
            "(pp * self.fsdp.size + fsdp) * self.tp.size + tp",
            "(pp * self.tp.size + tp) * self.fsdp.size + fsdp",
        ),
        (
            "experts are shared by those that have others",
            "return self.experts if is_cut",
            "return self.dense if is_cut",
            EXPERTS,
        ),
    ),
]
CHECKPOINT_MUTANTS = [
    *mutants_of(
        "checkpoint/contents.py",
        (RANKS, CHECKPOINT),
        (
            "buffers are not saved",
            '        if shard.variable.is_parameter or shard.variable.persistent:\n            yield from _cut(f"model',
            '        if shard.variable.is_parameter:\n            yield from _cut(f"model',
        ),
        (
            "random numbers of rank 0 for all",
            'Piece(f"random/{rank}/{source}"',
            'Piece(f"random/0/{source}"',
        ),
        (
            "gradients' means are not saved",
            "if isinstance(value, Tensor) and value.shape == shard.public.shape and value.ndim:",
            'if key == "exp_avg":\n                continue\n            if isinstance(value, Tensor) and value.shape == shard.public.shape and value.ndim:',
            CHECKPOINT,
        ),
    ),
    *mutants_of(
        "checkpoint/restore.py",
        (RANKS, CHECKPOINT),
        (
            "buffers are not restored",
            "        if shard.variable.is_parameter or shard.variable.persistent:\n            _fill(",
            "        if shard.variable.is_parameter:\n            _fill(",
        ),
        (
            "random numbers of rank 0 for all",
            "rank = parallel.mesh.rank % reader.manifest.world_size",
            "rank = 0",
        ),
        (
            "torch's random numbers start anew",
            'torch.set_rng_state(reader.read(f"{prefix}torch"))',
            'reader.read(f"{prefix}torch")',
        ),
        ("numpy's random numbers start anew", "    np.random.set_state((", "    tuple(("),
        ("Python's random numbers start anew", "    random.setstate((", "    tuple(("),
        (
            "the optimizer starts anew",
            '    _fill(local_of(state), f"optimizer/',
            '    (local_of(state), f"optimizer/',
            CHECKPOINT,
        ),
        (
            "the optimizer's steps are forgotten",
            "return value.to(parallel.mesh.device) if on_device else value",
            "return torch.zeros_like(value)",
            CHECKPOINT,
        ),
    ),
    *mutants_of(
        "checkpoint/training_state.py",
        (RANKS, CHECKPOINT),
        (
            "steps are not counted on",
            "            self.parallel.num_steps = reader.manifest.num_steps\n",
            "",
        ),
        (
            "states are not restored",
            "holder.load_state_dict(reader.manifest.states[key])",
            "pass",
            CHECKPOINT,
        ),
        (
            "the optimizer is not restored",
            "restore.restore_optimizer(reader, self.parallel, self.optimizer, options=options)",
            "pass",
            CHECKPOINT,
        ),
    ),
    *mutants_of(
        "checkpoint/boxes.py",
        (EMULATED, LOAD),
        (
            "tp parts are all the first",
            "full = _at(dim, start + rank * part,",
            "full = _at(dim, start,",
        ),
        (
            "segments are one behind the other",
            "own = _at(dim, start // size,",
            "own = _at(dim, start,",
        ),
        (
            "dp rows are all the first",
            "_at(part.dim, part.start,",
            "_at(part.dim, 0,",
            UNUSUAL,
        ),
    ),
]
DATA_MUTANTS = [
    *mutants_of(
        "data/row_order.py",
        (DATA, BATCHES),
        (
            "every epoch in one order",
            "self._seed, epoch)",
            "self._seed, 0)",
        ),
        (
            "one order for every seed",
            "self._seed, epoch)",
            "0, epoch)",
        ),
        (
            "rows are not shuffled",
            "KeyedOrder(self._num_rows, self._seed, epoch)[rows[own]]",
            "rows[own]",
        ),
        (
            "a batch ends with its epoch",
            "np.unique(epochs).tolist()",
            "np.unique(epochs).tolist()[:1]",
        ),
        (
            "a resumed run begins anew",
            "self.rows_taken, self.batches_taken = rows_taken, batches_taken",
            "self.rows_taken, self.batches_taken = 0, batches_taken",
        ),
        (
            "skipped batches are taken",
            "while self.batches_taken in self._skip:",
            "while False:",
            BATCHES,
        ),
    ),
    *mutants_of(
        "data/batch_plan.py",
        (BATCHES,),
        (
            "the ramp is one step late",
            "self.increment * (batch // self.every)",
            "self.increment * ((batch - 1) // self.every)",
        ),
        ("ranges leave their end out", "first <= batch <= last for", "first <= batch < last for"),
    ),
    *mutants_of(
        "data/packed_text.py",
        (DATA,),
        (
            "labels are the tokens themselves",
            "labels = [*tokens[1:], IGNORED_LABEL]",
            "labels = tokens",
        ),
        (
            "a document's end is a target",
            "labels = [*tokens[1:], IGNORED_LABEL]",
            "labels = [*tokens[1:], tokens[0]]",
        ),
        (
            "positions go on through a row",
            "self.positions += range(len(tokens))",
            "self.positions += range(self.starts[-1], self.starts[-1] + len(tokens))",
        ),
    ),
    *mutants_of(
        "data/batches.py",
        (BATCHES,),
        (
            "validation leaves the last rows out",
            "-(-len(dataset) // global_batch_size)",
            "len(dataset) // global_batch_size",
        ),
        ("validation repeats the first batch", "start = batch * size", "start = 0 * size"),
    ),
    *mutants_of(
        "data/selection.py",
        (TOKENS,),
        ("short documents are taken", "shard.lengths >= least)", "shard.lengths >= 1)"),
        ("documents are not shuffled", "if shuffle_seed is not None:", "if False:"),
    ),
    *mutants_of(
        "data/row_layout.py",
        (TOKENS,),
        ("rows of too many documents", " - first >= max_documents)", " - first > max_documents)"),
    ),
]
STATE_MUTANTS: list[SourceMutant] = [*VALUE_MUTANTS, *CHECKPOINT_MUTANTS, *DATA_MUTANTS]
