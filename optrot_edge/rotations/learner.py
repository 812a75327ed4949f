"""One OptRot run: which rows meet which step, what is kept in memory, what is shared between processes.

A step on R1 takes all rows, or draws them: row i is in with probability
p_i = min(1, c‖row‖⁴) and weighs 1/p_i, so heavy rows are always there, none twice, and the gradient is
unbiased. Draws are seeded by (seed, step, layer): they depend neither on the number of processes nor on memory.

R2 and R1 take PASS_STEPS steps in turn. One pass over the layers moves R2, on all rows of v and o, the problems
of many layers in one batch, and fills a pool with the rows of R1's next steps, drawn without replacement and,
when POOL bytes are too few for as many fresh ones, shared between those steps. Layers are kept between passes
while the device has room, and otherwise read again, one at a time; that changes the time but not the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from optrot_edge.device import widest_float
from optrot_edge.kernels.fourth_power import fourth_power
from optrot_edge.rotations.distributed import World, spare_memory
from optrot_edge.rotations.objective import MATRICES, LayerRows, fourth_powers, value_gradient, value_problems
from optrot_edge.rotations.options import OptRotOptions
from optrot_edge.rotations.rotation import Rotation, projected
from optrot_edge.rotations.sampling import RowSampler, systematic_sample
from optrot_edge.rotations.solvers import MOMENTUM, Descent

PASS_STEPS = 5  # 1 costs a product of all v and o with R1 per step; the more, the staler R1 and R2 to each other
POOL = 2**31  # bytes of rows held for the steps between two passes
CHUNK = 2**29  # bytes of layers whose R2 problems are solved in one batch


class Learner:
    """State of one run: float32 rotations on the device, and passes over this process's layers.

    `passes` does the work, `losses` measures, `finish` gives the rotations. See `optrot.learn` for arguments.
    """

    def __init__(self, source, start: Rotation, options: OptRotOptions, generator, device: str):
        self.source, self.config, self.options, self.device = source, source.config, options, device
        self.world = World(device)
        self.seed = int(torch.randint(2**62, (), generator=generator))
        self.r4_block = start.r4_block
        self.r1 = self.r2 = None
        if start.r1 is not None:
            self.r1 = Descent(start.r1.to(device, torch.float32), options, MOMENTUM["r1"])
        if start.r2 is not None:
            self.r2 = Descent(start.r2.to(device, torch.float32), options, MOMENTUM["r2"])
        self.chosen: dict[int, set[str]] | None = None  # by layer; None: every matrix counts
        self.cache: dict[int, LayerRows] = {}
        self.room = spare_memory(device) if options.memory is None else options.memory

    def read(self, index: int, chosen: set[str] | None = None) -> LayerRows:
        """Layer `index` from the checkpoint, float32 on the device."""
        layer = {k: v.to(self.device) for k, v in self.source.layer(index, torch.float32).items()}
        return LayerRows.of(layer, self.config, fold=self.r1 is not None, r4_block=self.r4_block, chosen=chosen)

    def layers(self) -> Iterator[tuple[int, LayerRows]]:
        """This process's layers, kept for the next pass while there is room."""
        for index in self.world.mine(self.config.num_hidden_layers):
            rows = self.cache.get(index)
            if rows is None:
                rows = self.read(index, None if self.chosen is None else self.chosen[index])
                if rows.nbytes + sum(kept.nbytes for kept in self.cache.values()) <= self.room:
                    self.cache[index] = rows
            yield index, rows

    def chunks(self) -> Iterator[list[tuple[int, LayerRows]]]:
        """`layers` in groups whose R2 problems (and, unless they are cached, all rows) fit CHUNK bytes."""
        group, size = [], 0
        for index, rows in self.layers():
            cost = rows.values.nbytes if index in self.cache else rows.nbytes
            if group and size + cost > CHUNK:
                yield group
                group, size = [], 0
            group.append((index, rows))
            size += cost
        if group:
            yield group

    def r1_matrix(self) -> torch.Tensor | None:
        return None if self.r1 is None else self.r1.matrix

    def r2_of(self, index: int) -> torch.Tensor | None:
        return None if self.r2 is None else self.r2.matrix[index]

    def losses(self) -> torch.Tensor:
        """Exact loss of every matrix [layers, len(MATRICES)], whether it counts or not."""
        found = torch.zeros(self.config.num_hidden_layers, len(MATRICES), dtype=widest_float(self.device))
        for index in self.world.mine(self.config.num_hidden_layers):
            rows = self.read(index) if self.chosen is not None or index not in self.cache else self.cache[index]
            matrices = rows.matrices(self.r2_of(index))
            for column, name in enumerate(MATRICES):
                found[index, column] = fourth_powers(matrices[name], self.r1_matrix())
        return self.world.sum(found)

    def choose(self, losses: torch.Tensor, count: int) -> None:
        """Let only the `count` matrices of largest loss count."""
        kept = losses.flatten().argsort(descending=True, stable=True)[:count].tolist()
        self.chosen = {index: set() for index in range(len(losses))}
        for place in kept:
            self.chosen[place // len(MATRICES)].add(MATRICES[place % len(MATRICES)])
        self.cache.clear()

    def sampler(self) -> RowSampler:
        """Over the rows that count, of all processes."""
        config = self.config
        width = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        mass = torch.zeros(config.num_hidden_layers, width + 3 * config.intermediate_size)
        for index, rows in self.layers():
            mass[index, :len(rows.mass)] = rows.mass.cpu()
        return RowSampler(self.world.sum(mass))

    def draw(self, rows: LayerRows, index: int, step: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of one layer, each with probability min(1, scale·mass), and their masses."""
        kept = systematic_sample((rows.mass * scale).clamp(max=1), [self.seed, step, index, 0])
        fixed = kept[kept < len(rows.fixed)]
        values = rows.value_rows(self.r2_of(index))[kept[len(fixed):] - len(rows.fixed)]
        return torch.cat([rows.fixed[fixed], values]), rows.mass[kept]

    def descend_values(self, group: list[tuple[int, LayerRows]], first: int, last: int) -> list[float]:
        """Steps `first`..`last` of the R2 problems of a group of layers; their summed loss before each."""
        at, losses = [index for index, _ in group], []
        z = value_problems([rows for _, rows in group], self.r1_matrix())
        for step in range(first, last):
            matrices = self.r2.matrix[at]
            loss, gradient = value_gradient(z, matrices.flatten(0, 1))
            self.r2.advance(gradient.view(matrices.shape), step, at)
            losses.append(float(loss.sum()))
        return losses

    def full_step(self, step: int) -> list[float]:
        """One step of every rotation on all rows: a joint gradient, one pass. Returns [loss before]."""
        gradient = None if self.r1 is None else self.zero_gradient()
        total = 0.0
        for group in self.chunks():
            if gradient is not None:
                for index, rows in group:
                    loss, more = rows.gradient(self.r1.matrix, self.r2_of(index))
                    total, gradient = total + loss, gradient.add_(more)
            if self.r2 is not None:
                values = self.descend_values(group, step, step + 1)
                total += values[0] if gradient is None else 0.0
        if gradient is not None:
            self.descend_residual(gradient, step)
        return [self.total(total)]

    def sampled_steps(self, first: int, last: int, sampler: RowSampler) -> list[float]:
        """One pass: steps of R2 on all its rows, the pool for R1's, then those. Returns the estimated losses."""
        hidden = self.config.hidden_size
        batches = [self.options.batch(step, hidden) for step in range(first, last)]
        scale = sampler.scale(max(max(batches), min(sum(batches), POOL / (4 * hidden))))
        pool, values = [], torch.zeros(last - first, dtype=torch.float64)
        for group in self.chunks():
            if self.r2 is not None:
                values += torch.tensor(self.descend_values(group, first, last))
            if self.r1 is not None:
                pool += [(index, *self.draw(rows, index, first, scale)) for index, rows in group]
        if self.r1 is None:
            return [self.total(loss) for loss in values]
        return [self.pool_step(step, pool, min(sampler.scale(rows), scale), scale)
                for step, rows in enumerate(batches, first)]

    def pool_step(self, step: int, pool: list, scale: float, pool_scale: float) -> float:
        """A step of R1 on rows of the pool, each in with min(1, scale·mass) all told; the estimated loss."""
        total, gradient = 0.0, self.zero_gradient()
        for index, rows, mass in pool:
            p = (mass * scale).clamp(max=1)
            if scale < pool_scale:
                kept = systematic_sample(p / (mass * pool_scale).clamp(max=1), [self.seed, step, index, 1])
                rows, p = rows[kept], p[kept]
            loss, more = fourth_power(rows, self.r1.matrix, 1 / p)
            total, gradient = total + loss, gradient.add_(more)
        self.descend_residual(gradient, step)
        return self.total(total)

    def zero_gradient(self) -> torch.Tensor:
        """Where R1's gradient is summed: in float64, so that the order of the layers, and with it the number of
        processes, hardly ever changes a bit. The descent would soon blow up float32's rounding."""
        return torch.zeros_like(self.r1.matrix, dtype=widest_float(self.device))

    def descend_residual(self, gradient: torch.Tensor, step: int) -> None:
        """A step of R1 against `gradient` summed over the processes."""
        self.r1.advance(self.world.sum(gradient).float(), step)

    def total(self, loss: torch.Tensor | float) -> float:
        """`loss` (a scalar) summed over the processes."""
        return float(self.world.sum(torch.tensor(float(loss), dtype=widest_float(self.device))))

    def pass_steps(self) -> int:
        """Steps per pass over the layers; from the model alone."""
        if self.options.rows_per_step(self.config.hidden_size) is None:
            return 1
        if self.r1 is None:
            return self.options.steps  # the R2 problems stand alone: one pass solves them
        return PASS_STEPS

    def passes(self) -> Iterator[tuple[int, list[float]]]:
        """Take all steps, or as many as the stopping rule lets; after each pass the number of steps taken and the
        losses before each of the pass's, estimated from its rows."""
        stride, losses = self.pass_steps(), []
        full = self.options.rows_per_step(self.config.hidden_size) is None
        sampler = None if full else self.sampler()
        for first in range(0, self.options.steps, stride):
            last = min(first + stride, self.options.steps)
            found = self.full_step(first) if full else self.sampled_steps(first, last, sampler)
            losses += found
            yield last, found
            if self.options.finished(losses):
                return

    def finish(self) -> dict[str, torch.Tensor | None]:
        """Float64 rotations on the CPU, polar-projected, from every process; they replace the learner's."""
        learned: dict[str, torch.Tensor | None] = {"r1": None, "r2": None}
        if self.r1 is not None:
            learned["r1"] = self.world.from_first(self.r1.matrix)
        if self.r2 is not None:
            own = torch.zeros_like(self.r2.matrix)
            mine = list(self.world.mine(len(own)))
            own[mine] = self.r2.matrix[mine]
            learned["r2"] = self.world.sum(own)
        for name, matrix in learned.items():
            if matrix is None:
                continue
            learned[name] = projected(matrix)
            getattr(self, name).matrix = learned[name].to(self.device, torch.float32)
        return learned
