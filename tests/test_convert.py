"""Proto to core to proto is identity, and bad input answers with the path of the field."""

from typing import Any

import pytest
from google.protobuf import json_format

from knowledge_engine import core
from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.server import convert
from knowledge_engine.v1 import generation_pb2, inference_pb2, training_pb2

TRAINING: dict[str, Any] = {
    "base_model": "tiny",
    "dataset": "datasets/d",
    "model": "models/m",
    "use_qlora": False,
    "lora": {
        "rank": 4,
        "alpha": 8,
        "dropout": 0.25,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "use_dora": True,
    },
    "learning_rate": 0.001,
    "lr_scheduler_type": "LR_SCHEDULER_TYPE_COSINE",
    "warmup_ratio": 0.125,
    "weight_decay": 0.5,
    "max_grad_norm": 2.0,
    "max_steps": 7,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_length": 128,
    "eval_split": 0.25,
    "split_by": "SPLIT_BY_PRODUCT",
    "truncation": "TRUNCATION_DROP",
    "start_from": "models/m/versions/3",
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
    "eval_steps": 5,
    "logging_steps": 4,
    "seed": 11,
    "save_steps": 6,
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 2.5,
}
GENERATION: dict[str, Any] = {
    "catalogue": "datasets/c",
    "dataset": "datasets/d",
    "num_conversations": 20,
    "topics": ["lamps", "desks"],
    "difficulty_level": "DIFFICULTY_LEVEL_COMPLEX",
    "include_product_data": False,
    "seed": 3,
    "provider": "GENERATION_PROVIDER_OPENAI",
}


def training(**changes: Any) -> training_pb2.TrainingSpec:
    return json_format.ParseDict(TRAINING | changes, training_pb2.TrainingSpec())


def test_a_training_spec_comes_back_as_it_went() -> None:
    protos = [
        training(),
        training(max_steps=None, num_train_epochs=2.0, eval_split=0.0, split_by="SPLIT_BY_CONVERSATION",
                 eval_dataset="datasets/exam", method="TRAINING_METHOD_SFT"),
        training(split_by="SPLIT_BY_CONVERSATION", method="TRAINING_METHOD_DPO", beta=0.25),
    ]  # fmt: skip
    named: set[str] = set()
    for proto in protos:
        back = convert.training_spec_proto(convert.training_spec(proto))
        proto.method = proto.method or training_pb2.TRAINING_METHOD_SFT
        assert back == proto
        named |= {field.name for field, _ in proto.ListFields()}
    # Every field of the contract is in a sample, so none can be forgotten here.
    assert named == {field.name for field in training_pb2.TrainingSpec.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_dataset": "datasets/exam"}, "set eval_dataset or eval_split, not both"),
        ({"beta": 0.5}, "beta is for method dpo"),
        ({"method": "TRAINING_METHOD_DPO"}, "near-duplicates on one side"),  # beside SPLIT_BY_PRODUCT
        (
            {
                "method": "TRAINING_METHOD_DPO",
                "truncation": "TRUNCATION_KEEP_LAST_TURNS",
                "split_by": "SPLIT_BY_CONVERSATION",
            },
            "keep the same prompt",
        ),
        ({"eval_steps": 0}, "need eval_steps above 0"),
        ({"eval_split": 0.0}, "split_by says what to hold out"),
        ({"start_from": "models/m"}, "spec.start_from"),
        ({"truncation": 9}, "is not one of the known values"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpecError, match=said):
        convert.training_spec(training(**changes))


def test_defaults_that_depend_on_other_fields_are_filled_in() -> None:
    bare = {"dataset": "d", "model": "m"}
    assert core.TrainingSpec.model_validate(bare).eval_split == 0.1
    assert core.TrainingSpec.model_validate(bare | {"eval_dataset": "e"}).eval_split == 0
    dpo = core.TrainingSpec.model_validate(bare | {"method": "dpo"})
    assert (dpo.beta, core.TrainingSpec.model_validate(bare).beta) == (0.1, None)
    assert core.TrainingSpec.model_validate(dpo.model_dump()) == dpo


MUTATIONS: dict[str, Any] = {
    "base_model": "other",
    "dataset": "datasets/e",
    "model": "models/n",
    "max_steps": 8,
    "start_from": "models/m/versions/4",
    "split_by": "SPLIT_BY_CONVERSATION",
    "truncation": "TRUNCATION_ERROR",
}


@pytest.mark.parametrize("field", TRAINING)
def test_another_value_of_any_field_is_another_spec(field: str) -> None:
    value = TRAINING[field]
    if field in MUTATIONS:
        other = MUTATIONS[field]
    elif field == "lora":
        other = value | {"rank": 5}
    elif field == "lr_scheduler_type":
        other = "LR_SCHEDULER_TYPE_CONSTANT"
    else:
        other = not value if isinstance(value, bool) else value * 2 if isinstance(value, int) else value / 2
    before, after = convert.training_spec(training()), convert.training_spec(training(**{field: other}))
    assert before != after
    assert {name for name in TRAINING if getattr(before, name) != getattr(after, name)} == {field}


def test_a_generation_spec_comes_back_as_it_went() -> None:
    proto = json_format.ParseDict(GENERATION, generation_pb2.GenerationSpec())
    spec = convert.generation_spec(proto)
    assert convert.job(job_with(spec)).generation == proto
    assert {field.name for field, _ in proto.ListFields()} == {field.name for field in proto.DESCRIPTOR.fields}


def job_with(spec: core.JobSpec) -> core.Job:
    return core.Job(
        id="job-1", kind=core.JobKind.GENERATION, state=core.JobState.QUEUED, spec=spec, create_time=core.utc_now()
    )


def test_unset_fields_take_the_documented_defaults() -> None:
    minimal = training_pb2.TrainingSpec(dataset="datasets/d", model="models/m")
    assert convert.training_spec(minimal) == core.TrainingSpec(dataset="d", model="m")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"dataset": "d"}, "spec.dataset"),
        ({"dataset": "datasets/../x"}, "spec.dataset"),
        ({"dataset": ""}, "spec.dataset"),
        ({"model": "models/base"}, "spec.model"),
        ({"model": "models/a/versions/1"}, "spec.model"),
        ({"base_model": "/etc/passwd"}, "spec.base_model"),
        ({"base_model": "org/name"}, "spec.base_model"),
        ({"learning_rate": 0}, "spec.learning_rate"),
        ({"learning_rate": "NaN"}, "spec.learning_rate"),
        ({"learning_rate": "Infinity"}, "spec.learning_rate"),
        ({"lora": {"rank": 0}}, "spec.lora.rank"),
        ({"lora": {"dropout": 1.0}}, "spec.lora.dropout"),
        ({"lora": {"target_modules": [""]}}, "spec.lora.target_modules[0]"),
        ({"lr_scheduler_type": 99}, "spec.lr_scheduler_type"),
        ({"num_train_epochs": 1.0}, "spec"),
        ({"eval_split": 0}, "spec"),  # nothing to evaluate every eval_steps on
        ({"max_steps": 0}, "spec.max_steps"),
        ({"per_device_train_batch_size": 65}, "spec.per_device_train_batch_size"),
        ({"eval_split": 0.6}, "spec.eval_split"),
        ({"save_steps": -1}, "spec.save_steps"),
        ({"save_steps": 1_000_001}, "spec.save_steps"),
        ({"seed": -1}, "spec.seed"),
        ({"seed": 2**32}, "spec.seed"),
    ],
)
def test_a_bad_training_spec_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        convert.training_spec(training(**changes))
    assert [violation.field for violation in caught.value.violations] == [field]


def ask(**changes: Any) -> inference_pb2.GenerationInput:
    given = {"model": "base", "messages": [{"role": "user", "content": "hi"}]} | changes
    return json_format.ParseDict(given, inference_pb2.GenerationInput())


CALL = {"name": "a", "arguments": '{"b":1}'}


def asked_with(*calls: dict[str, str]) -> list[dict[str, Any]]:
    called = {"role": "assistant", "tool_calls": list(calls)}
    return [{"role": "user", "content": "hi"}, called, {"role": "tool", "content": "x"}]


def test_tools_and_calls_arrive_in_one_form() -> None:
    tools = [{"name": "a", "description": "Does.", "parameters": '{"z": 1.50,\n"b": ["ü"]}'}, {"name": "c"}]
    asked = convert.generation_input(ask(messages=asked_with(CALL), tools=tools))
    assert asked.tools == (
        core.Tool(name="a", description="Does.", parameters='{"z": 1.5, "b": ["ü"]}'),
        core.Tool(name="c"),
    )
    assert asked.messages[1].tool_calls == (core.ToolCall(name="a", arguments='{"b": 1}'),)
    assert (asked.messages[1].content, asked.messages[2].role) == ("", "tool")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": ""}, "input.model"),
        ({"model": "shop"}, "input.model"),
        ({"model": "models/shop@production"}, "input.model"),
        ({"model": "models/shop/versions/0"}, "input.model"),
        ({"model": "models/shop/versions/1e3"}, "input.model"),
        ({"model": "models/shop/versions/" + "9" * 40}, "input.model"),
        ({"messages": []}, "input.messages"),
        ({"messages": [{"role": "user", "content": "hi"}] * 201}, "input.messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "input.messages[0].role"),
        ({"messages": [{"role": "user", "content": ""}]}, "input.messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "input"),
        ({"temperature": 2.5}, "input.temperature"),
        ({"temperature": "NaN"}, "input.temperature"),
        ({"top_p": -0.1}, "input.top_p"),
        ({"top_k": -1}, "input.top_k"),
        ({"max_tokens": 0}, "input.max_tokens"),
        ({"stop": ["a"] * 9}, "input.stop"),
        ({"stop": [""]}, "input.stop[0]"),
        ({"seed": -1}, "input.seed"),
        ({"min_p": 1.1}, "input.min_p"),
        ({"repetition_penalty": 0}, "input.repetition_penalty"),
        ({"presence_penalty": -2.1}, "input.presence_penalty"),
        ({"frequency_penalty": 2.1}, "input.frequency_penalty"),
        ({"json_schema": ""}, "input.json_schema"),
        ({"regex": "x" * 4097}, "input.regex"),
        ({"regex": "x", "json_schema": "{}"}, "input"),
        ({"n": 9}, "input.n"),
        ({"n": 2, "temperature": 0}, "input"),
        ({"top_logprobs": 1}, "input"),
        ({"top_logprobs": 21, "logprobs": True}, "input.top_logprobs"),
        ({"tools": [{"name": "a b"}]}, "input.tools[0]"),
        ({"tools": [{"name": "a", "parameters": "[]"}]}, "input.tools[0]"),
        ({"tools": [{"name": "a"}] * 2}, "input.tools"),
        ({"tools": [{"name": f"a{at}"} for at in range(129)]}, "input.tools"),
        ({"messages": asked_with({"name": "b", "arguments": "{}"}), "tools": [{"name": "a"}]}, "input.messages[1]"),
        ({"messages": asked_with({"name": "a", "arguments": "{}"})}, "input.messages[1]"),
        ({"messages": asked_with({"name": "a"}), "tools": [{"name": "a"}]}, "input.messages[1].tool_calls[0]"),
        ({"messages": asked_with(*[{"name": "a", "arguments": "{}"}] * 129)}, "input.messages[1].tool_calls"),
        ({"messages": asked_with(CALL)[:2], "tools": [{"name": "a"}]}, "input"),
        ({"messages": asked_with(CALL, CALL), "tools": [{"name": "a"}]}, "input.messages"),
        (
            {"messages": [*asked_with(CALL), {"role": "tool", "content": "x"}], "tools": [{"name": "a"}]},
            "input.messages[3]",
        ),
        (
            {
                "messages": [*asked_with(CALL)[:2], {"role": "tool", "content": "x", "tool_call_id": "y"}],
                "tools": [{"name": "a"}],
            },
            "input.messages[2].tool_call_id",
        ),
        (
            {"messages": [*asked_with(CALL)[:2], {"role": "tool"}], "tools": [{"name": "a"}]},
            "input.messages[2].content",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "input.messages[0]"),
        (
            {"messages": asked_with({"name": "a", "arguments": f'{{"{"k" * 9000}": 1, "{"k" * 9000}": 2}}'})},
            "input.messages[1].tool_calls[0]",
        ),
    ],
)
def test_a_bad_question_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        convert.generation_input(ask(**changes))
    assert [violation.field for violation in caught.value.violations] == [field]
    assert len(caught.value.message) < 400  # it travels in a trailer


def test_context_arrives_with_whole_numbers_whole() -> None:
    asked = convert.generation_input(ask(context={"products": [{"title": "Lamp", "price": 20, "rating": 4.5}]}))
    assert asked.context == {"products": [{"title": "Lamp", "price": 20, "rating": 4.5}]}
    assert isinstance(asked.context["products"][0]["price"], int)


def test_a_version_can_be_asked_for() -> None:
    asked = convert.generation_input(ask(model="models/shop/versions/12"))
    assert (asked.model, asked.version) == ("shop", 12)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "jobs",
        "jobs/",
        "jobs/..",
        "jobs/a/b",
        "jobs/%2e%2e",
        "jobs/a\0",
        "jobs/a\n",
        "jobs/" + "a" * 300,
        "job/a",
        "jobs/.",
        "jobs/-a",
        "jobs/．．",
        "../jobs/a",
        "jobs//a",
        "jobs/C:\\x",
    ],
)
def test_names_with_tricks_are_refused(name: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        convert.parse_name(name, "jobs")
    assert caught.value.reason is Reason.NAME_INVALID


def test_page_tokens_are_opaque_and_checked() -> None:
    assert convert.page(0, "") == core.Page(convert.DEFAULT_PAGE_SIZE, None)
    assert convert.page(7, convert.page_token("job-1")) == core.Page(7, "job-1")
    for size, token, reason in (
        (-1, "", Reason.SPEC_INVALID),
        (1001, "", Reason.SPEC_INVALID),
        (1, "%%%", Reason.PAGE_TOKEN_INVALID),
        (1, "ünï", Reason.PAGE_TOKEN_INVALID),
    ):
        with pytest.raises(InvalidSpecError) as caught:
            convert.page(size, token)
        assert caught.value.reason is reason
