"""What the API says of itself, for whoever makes a client from it."""

import pytest

ERRORS = "application/problem+json"


@pytest.fixture
def document(app):
    return app.openapi()


def operations(document):
    return [(f"{method} {path}", one) for path, own in document["paths"].items() for method, one in own.items()]


def test_every_parameter_and_every_field_that_is_no_constant_is_described(document):
    parameters = [
        f"{name} {one['name']}"
        for name, operation in operations(document)
        for one in operation.get("parameters", [])
        if one["in"] != "path" and "description" not in one
    ]
    fields = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, one in schema.get("properties", {}).items()
        if "const" not in one and "description" not in one
    ]

    assert (parameters, fields) == ([], [])


def test_every_error_is_described_where_its_media_type_is(document):
    for name, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == [ERRORS], (name, status)
                assert response["content"][ERRORS]["schema"] == {"$ref": "#/components/schemas/Problem"}, (name, status)
                assert "example" in response["content"][ERRORS]


def test_only_what_needs_a_key_says_that_one_may_be_wrong(document):
    for name, operation in operations(document):
        assert ("401" in operation["responses"]) is bool(operation.get("security")), name


def test_every_media_type_of_an_upload_is_named(document):
    content = document["paths"]["/v1/datasets"]["post"]["requestBody"]["content"]

    assert set(content) == {
        "application/jsonl",
        "application/x-ndjson",
        "application/json",
        "text/csv",
        "application/vnd.apache.parquet",
    }
