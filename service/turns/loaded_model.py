"""The model that the server has loaded, as turns see it: the engine, the tokenizer and the identity of the weights."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from model.policies.network import Policy
from model.recall import RecallPlan
from model.tabular.decision_rules import RULES
from model.text.grammar import GrammarCompiler
from model.text.sentence_encoder import SentenceEncoder
from model.text.tokenizer import Tokenizer
from service.engine import AnyLearner, Engine
from service.errors import BadRequest, Conflict
from service.store.base import Option, SessionMeta
from service.tenants import Tenant


@dataclass(frozen=True)
class LoadedModel:
    """The model of text and the policies that the server has loaded.

    Attributes:
        context: number of tokens that one request may hold.
        num_parameters: of the base; shared ones count once.
        fingerprints: fingerprints of the base and of the memory's slow weights, by part.
        policies: the policies by name.
        tabular: the learners of tables by name; what is said of policies below holds for them too.
        former_names: the name under which a policy is served whose own name is that of a learner.
        policy_fingerprints: the fingerprint of the slow weights of each policy and each learner, by name.
        recall: how replies read episodes.
        grammars: the compiler of grammars for the tokens of the model of text.
        encoder: the sentence encoder, which the engine's thread runs; None = the server has none.
        parameters, disk_bytes: the number of the base's weights, and the bytes of the base's files.
    """

    engine: Engine
    tokenizer: Tokenizer
    fingerprints: dict[str, str]
    context: int
    vocab_size: int
    num_parameters: int
    recall: RecallPlan
    grammars: GrammarCompiler
    policies: dict[str, Policy] = field(default_factory=dict)
    tabular: dict[str, AnyLearner] = field(default_factory=dict)
    former_names: dict[str, str] = field(default_factory=dict)
    policy_fingerprints: dict[str, str] = field(default_factory=dict)
    encoder: SentenceEncoder | None = None
    parameters: int = 0
    disk_bytes: int = 0

    @property
    def text_fingerprint(self) -> str:
        """One fingerprint of everything that the rows of a text session depend on."""
        return "sha256:" + hashlib.sha256(json.dumps(self.fingerprints, sort_keys=True).encode()).hexdigest()

    def policy_with_fingerprint(self, fingerprint: str) -> str | None:
        """Return the policy that has the fingerprint; "" for the model of text; None if neither has it."""
        if fingerprint == self.text_fingerprint:
            return ""
        return next((name for name, own in self.policy_fingerprints.items() if own == fingerprint), None)

    def keeps_episodes(self, tenant: Tenant, options: Mapping[str, Option], requested: bool | None = None) -> bool:
        """Return whether a turn keeps and reads episodes: unless server, tenant, session or request forbids it."""
        is_allowed = self.recall.max_tokens > 0 and tenant.recall
        return is_allowed and options.get("recall") is not False and requested is not False

    def require_model(self, meta: SessionMeta, policy: str = "") -> None:
        """Raise Conflict unless the slow weights of `policy` (or of text, for "") wrote the session."""
        expected = self.policy_fingerprints[policy] if policy else self.text_fingerprint
        if meta.model != expected:
            other = self.policy_with_fingerprint(meta.model)
            trained_by = f"policy {other!r}" if other else "the model of text" if other == "" else "other slow weights"
            asked = f"policy {policy!r}" if policy else "the model of text"
            raise Conflict(
                f"Session {meta.id!r} was learned by {trained_by}, and {asked} of this server cannot read it; "
                "use another session.",
                code="model_mismatch",
            )

    def require_loaded_model(self, meta: SessionMeta) -> str:
        """Return the policy of a session ("" for text). Raise Conflict if its slow weights are not loaded."""
        policy = self.policy_with_fingerprint(meta.model)
        if policy is None:
            self.require_model(meta)
        return policy or ""

    def row_vocab_size(self, policy: str = "") -> int:
        """Return the number of tokens, or of actions for a policy, that a stored row may name."""
        if policy in self.tabular:
            return 0
        return self.policies[policy].config.actions if policy else self.vocab_size

    def of_fixed_shapes(self, name: str) -> str:
        """Return the policy of fixed shapes that had the name of a learner before; else the name itself."""
        return self.former_names.get(name, name)

    def require_options(self, meta: SessionMeta | None, policy: str, options: Mapping[str, Option]) -> None:
        """Raise BadRequest for rules of decisions in a session that takes none; meta: None = a new session."""
        name = policy if meta is None else self.policy_with_fingerprint(meta.model)
        learner = self.tabular.get(name or "")
        for option in RULES:
            if option in options and (learner is None or learner.config.task != "bandit"):
                raise BadRequest(f"'{option}' is an option of sessions of 'bandit', which decide.", param=option)

    def new_meta(self, name: str, options: dict[str, Option], policy: str = "") -> SessionMeta:
        """Return the meta of a session that has learned nothing."""
        now = time.time()
        return SessionMeta(
            id=name,
            version=0,
            model=self.policy_fingerprints[policy] if policy else self.text_fingerprint,
            tokens_learned=0,
            rows=0,
            bytes=0,
            created=now,
            updated=now,
            proof_tokens=0,
            loss_sum=0.0,
            frozen_loss_sum=0.0,
            requests=0,
            options=options,
            digests=(),
        )
