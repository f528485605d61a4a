"""The faults that `make mutants` plants in the protocol and in the checksums of KV blocks, one at a time."""

from __future__ import annotations


class Mutant:
    """A fault: ``edits`` are pairs of an old passage, there exactly once, and what replaces it."""

    def __init__(self, name: str, file: str, *edits: tuple[str, str]) -> None:
        self.name = name
        self.file = file  #: under arriero
        self.edits = edits


MUTANTS = (
    # The commit point
    Mutant(
        "resume on commit timeout",
        "core/migration.py",
        (
            """        if self.state is State.COMMITTING or self._poll_s is not None:
""",
            """        if self.state is State.COMMITTING:
            return self._uncommit("commit timeout", now)
        if self._poll_s is not None:
""",
        ),
    ),
    Mutant(
        "resume when the destination has delivered",
        "core/migration.py",
        (
            "        delivered = len(self._tokens) > self._handover.num_output_tokens\n",
            "        delivered = False\n",
        ),
    ),
    Mutant(
        "resume or replay what has finished at the destination",
        "core/migration.py",
        (
            """        self._wanted = False
        if self.state is State.COMMITTING:
            return []""",
            """        if self.state is State.COMMITTING:
            return []
        self._wanted = False
        if not self.state:
            return []""",
        ),
    ),
    Mutant(
        "commit after abort: DROP is acknowledged, the reservation stays",
        "core/destination.py",
        ('            self._end_incoming(incoming, "dropped", now)\n', "            pass\n"),
    ),
    Mutant(
        "commit after abort: a refused COMMIT may succeed when asked again",
        "core/destination.py",
        (
            """            incoming.state, incoming.end_reason = _In.DROPPING, "an import is running"
            raise ProtocolError(incoming.end_reason)
""",
            """            raise ProtocolError("an import is running")
""",
        ),
    ),
    Mutant(
        "commit forgotten while the request runs",
        "core/destination.py",
        ("if incoming.state is _In.COMMITTED and self._engine.find(incoming.request_id) is not None:", "if False:"),
    ),
    Mutant(
        "route not switched back when COMMIT is refused",
        "core/migration.py",
        ("                before = [Route(self._source)]\n", "                before = []\n"),
    ),
    Mutant(
        "a hand-over that disagrees with the token log is committed",
        "core/migration.py",
        ("        if answer.num_output_tokens != len(self._tokens):\n", "        if False:\n"),
    ),
    # The source
    Mutant(
        "free before commit",
        "core/source.py",
        (
            "                outgoing.state, outgoing.answer = _Out.DETACHED, answer\n",
            """                outgoing.state, outgoing.answer = _Out.DETACHED, answer
                self._engine.release(detach.request_id)
""",
        ),
    ),
    Mutant(
        "last block not copied",
        "core/source.py",
        (
            "        end = -(-num_computed // self._engine.block_size)\n",
            "        end = num_computed // self._engine.block_size\n",
        ),
    ),
    Mutant(
        "missing epoch check",
        "core/source.py",
        ("        if epoch >= 0 and status.epoch != epoch:\n", "        if False:\n"),
    ),
    Mutant(
        "duplicate token on late output: hand over under a step in flight",
        "core/source.py",
        ("        if status is not None and status.in_flight:\n", "        if False:\n"),
    ),
    Mutant(
        "double release: no tombstone, no owner",
        "core/source.py",
        (
            """        if outgoing.state is _Out.ENDED:
            outgoing.seen_s = now
            if outgoing.released""",
            """        if outgoing.state is _Out.ENDED and not released:
            outgoing.seen_s = now
            if outgoing.released""",
        ),
        (
            """        if released and self._frozen.get(message.request_id) == migration_id:
            del self._frozen[message.request_id]
""",
            """        if released:
            self._frozen.pop(message.request_id, None)
""",
        ),
    ),
    Mutant(
        "release of what another migration holds",
        "core/source.py",
        (
            """        if released and self._frozen.get(message.request_id) == migration_id:
            del self._frozen[message.request_id]
""",
            """        if released:
            self._frozen.pop(message.request_id, None)
""",
        ),
    ),
    Mutant(
        "a detached request resumes by itself when its lease runs out",
        "core/source.py",
        (
            "            if outgoing.state is _Out.COPYING and age > self._config.lease_s:\n",
            "            if outgoing.state in (_Out.COPYING, _Out.DETACHED) and age > self._config.lease_s:\n",
        ),
    ),
    Mutant(
        "a repeated COPY exports again",
        "core/source.py",
        (
            "        if outgoing.answer is not None and message.first != outgoing.answer.end:\n",
            "        if False:\n",
        ),
    ),
    Mutant(
        "staging memory freed under an export",
        "core/source.py",
        (
            """        if not outgoing.exporting:
            self._engine.close_export(migration_id)
""",
            """        self._engine.close_export(migration_id)
""",
        ),
    ),
    Mutant(
        "staging memory leaks",
        "core/source.py",
        (
            """        if not outgoing.exporting:
            self._engine.close_export(migration_id)
""",
            "",
        ),
    ),
    # The destination
    Mutant(
        "leak on refused reserve",
        "core/destination.py",
        (
            """            except ArrieroError:
                self._discard_parked(message.request_id)
                raise
""",
            """            except ArrieroError:
                del self._parked[message.request_id]
                raise
""",
        ),
    ),
    Mutant(
        "lease expiry during an import frees the blocks",
        "core/destination.py",
        (
            "            if incoming.state is _In.RESERVED and age > self._config.lease_s:\n",
            "            if incoming.state in (_In.RESERVED, _In.IMPORTING) and age > self._config.lease_s:\n",
        ),
    ),
    Mutant(
        "DROP during an import frees the blocks",
        "core/destination.py",
        (
            '            incoming.state, incoming.end_reason = _In.DROPPING, "dropped"\n',
            '            self._end_incoming(incoming, "dropped", now)\n',
        ),
    ),
    Mutant(
        "tokens told twice",
        "core/destination.py",
        ("        news = output_token_ids[incoming.known - known :]\n", "        news = output_token_ids\n"),
    ),
    # The owner
    Mutant(
        "lost abort during a move: the source resumes for nobody",
        "core/migration.py",
        ("            stays = self._wanted and not delivered\n", "            stays = not delivered\n"),
    ),
    Mutant(
        "lost abort during a move: the destination is not told",
        "core/migration.py",
        (
            "                return [Abort(self.destination)]  # behind COMMIT on the same connection\n",
            "                return []\n",
        ),
    ),
    Mutant(
        "DETACH waits for ever for a token",
        "core/migration.py",
        (
            """        if self.state is State.ALIGNING and now < self._give_up_s:
            return self._detach(now)
""",
            """        if self.state is State.ALIGNING and now < self._give_up_s:
            return []
""",
        ),
    ),
    Mutant(
        "DETACH is sent with every token",
        "core/migration.py",
        (
            "        return self._detach(now) if self.state is State.ALIGNING else []\n",
            "        return self._detach(now)\n",
        ),
    ),
    Mutant(
        "an answer of an earlier stage is taken for this one's",
        "core/migration.py",
        (
            "    return not (answer.ok and isinstance(message, Copy | Load)) or answer.first == message.first\n",
            "    return True\n",
        ),
    ),
    Mutant(
        "lost with its source: no replay",
        "core/migration.py",
        ("        replay = self._wanted and self._source_lost\n", "        replay = False\n"),
    ),
    Mutant(
        "clean-up is not asked for again",
        "core/migration.py",
        (
            "        return [*self._unacknowledged.values(), WakeAt(self._deadline())]\n",
            "        return [WakeAt(self._deadline())]\n",
        ),
    ),
    # Recovery and draining
    Mutant(
        "a bystander is given up with the culprit",
        "core/suspects.py",
        ("            return culprits or set(running)\n", "            return set(running)\n"),
    ),
    Mutant("two suspects on trial at once", "core/suspects.py", ("        if self.on_trial:\n", "        if False:\n")),
    Mutant(
        "given up for a death before it ran",
        "core/suspects.py",
        (
            "        culprits = {r for r in running if r in self._records and self._records[r].is_on_trial}\n",
            "        culprits = set(self.on_trial)\n",
        ),
    ),
    Mutant(
        "a place is never fenced",
        "core/restarts.py",
        ("        if len(crashes) >= config.max_deaths:\n", "        if False:\n"),
    ),
    Mutant(
        "a machine that stood still makes all instances hang",
        "core/watchdog.py",
        ("min(now - self._ticked_s, 2 * self.tick_s)", "now - self._ticked_s"),
    ),
    Mutant(
        "a drain waits for ever for what cannot move with its cache",
        "core/draining.py",
        (
            "        if need and (has_failed or not fits):\n",
            "        if need and not fits:\n            return None\n        if False:\n",
        ),
    ),
    Mutant(
        "a drain moves all at once",
        "core/draining.py",
        ("                if num_free <= 0 or not", "                if not"),
    ),
    # Checksums of KV blocks
    Mutant(
        "damaged blocks are taken",
        "transport/checksum.py",
        ("        if expected != self.value:\n", "        if False:\n"),
    ),
    Mutant(
        "blocks without a checksum are taken",
        "transport/checksum.py",
        ("        if expected != self.value:\n", "        if expected is not None and expected != self.value:\n"),
    ),
    Mutant(
        "only the last slice is checked",
        "transport/checksum.py",
        ("        self._hash.update(part.data)\n", "        self._hash = xxhash.xxh3_64(part.data)\n"),
    ),
    Mutant(
        "vLLM's worker does not look at the checksum",
        "vllm/worker.py",
        ("scatter(job.block_ids, stage, pacer).require(job.ticket)\n", "scatter(job.block_ids, stage, pacer)\n"),
    ),
    Mutant(
        "the importer's checksum is of what it had before",
        "vllm/blocks.py",
        (
            """            checksum.add(part)
            layer.scatter(index, part)
""",
            """            layer.scatter(index, part)
            checksum.add(part * 0)
""",
        ),
    ),
    Mutant(
        "the simulated engine does not look at the checksum",
        "sim/transport_copier.py",
        ("        checksum.require(ticket)\n", "        pass\n"),
    ),
)
