"""cluster/aws against Ray's schema and checks, and its instances against the EC2 API's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

FOLDER = Path(__file__).resolve().parents[3] / "cluster" / "aws"
SHARED_BY_NODES = {"MinCount": 1, "MaxCount": 1}
"""What Ray adds to each node's settings."""


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "ray-cluster.yaml").read_text())


def find_problems_of_instance(settings: dict[str, Any]) -> str:
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    return ParamValidator().validate(settings | SHARED_BY_NODES, shape).generate_report()


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = config["available_node_types"]
    return {name: types[name] for name in types if name != config["head_node_type"]}


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(config, json.loads(schema.read_text()))
    validate_config(prepare_config(copy.deepcopy(config)))  # as `ray up` does, defaults filled in


def test_ray_refuses_a_wrong_field(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["gpus"] = 0
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_ec2_accepts_every_node(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        assert not find_problems_of_instance(kind["node_config"])
    wrong = config["available_node_types"]["a100_40gb"]["node_config"] | {"MarketType": "spot"}
    assert "MarketType" in find_problems_of_instance(wrong)


def test_the_head_takes_no_work_and_has_no_gpu(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"], "a spot head loses the job with it"
    (command,) = [text for text in config["head_start_ray_commands"] if "--head" in text]
    assert "--num-gpus=0" in command
    assert "--dashboard-host=127.0.0.1" in command
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in command


def test_workers_are_spot_nodes_of_eight_a100_that_come_and_go(config: dict[str, Any]) -> None:
    instances = {}
    for name, kind in workers(config).items():
        instances[kind["node_config"]["InstanceType"]] = kind["resources"]
        assert kind["resources"][name] == kind["resources"]["GPU"] == 8
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= config["max_workers"]
    assert set(instances) == {"p4d.24xlarge", "p4de.24xlarge"}
    assert config["idle_timeout_minutes"] > 0
    assert config["provider"]["cache_stopped_nodes"] is False, "spot nodes cannot be stopped"


def test_token_authentication_is_on_and_the_token_is_a_file(config: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_nodes_reach_the_bucket_by_their_role(config: dict[str, Any]) -> None:
    for kind in config["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"]["Name"].startswith("fqgan-ray-")
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert "AWS_" not in json.dumps(config)


def test_the_head_may_pass_on_the_workers_role_and_end_its_own_nodes_only(
    config: dict[str, Any],
) -> None:
    statements = json.loads((FOLDER / "head-policy.json").read_text())["Statement"]
    by_action = {action: item for item in statements for action in item["Action"]}
    profiles = {
        kind["node_config"]["IamInstanceProfile"]["Name"] for kind in workers(config).values()
    }
    assert by_action["iam:PassRole"]["Resource"].endswith(f"role/{profiles.pop()}")
    assert not profiles
    condition = by_action["ec2:TerminateInstances"]["Condition"]["StringEquals"]
    assert condition == {"aws:ResourceTag/ray-cluster-name": config["cluster_name"]}


def test_the_head_tags_what_it_starts_and_its_own_nodes_only(config: dict[str, Any]) -> None:
    """Else it could tag any instance as its own, and end it."""
    statements = json.loads((FOLDER / "head-policy.json").read_text())["Statement"]
    tagging = [item for item in statements if "ec2:CreateTags" in item["Action"]]
    assert all(item["Action"] == ["ec2:CreateTags"] for item in tagging)
    conditions = [item["Condition"]["StringEquals"] for item in tagging]
    # Ray's autoscaler writes the state of a node into its tags after it was started too.
    assert conditions == [
        {"ec2:CreateAction": "RunInstances"},
        {"aws:ResourceTag/ray-cluster-name": config["cluster_name"]},
    ]


@pytest.mark.parametrize("name", ["head-policy.json", "worker-policy.json", "trust.json"])
def test_policies_are_policies(name: str) -> None:
    policy = json.loads((FOLDER / name).read_text())
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        assert "*" not in statement["Action"]
        assert statement.keys() & {"Resource", "Principal"}
