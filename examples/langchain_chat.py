"""LangChain with one model object for each user, which learns the user. Needs `pip install langchain-openai`."""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import SecretStr

url = os.environ.get("IMPRINT_URL", "http://127.0.0.1:8000")
key = os.environ.get("IMPRINT_API_KEY", "none")
served = OpenAI(base_url=f"{url}/v1", api_key=key).models.list().data[0]


def model_of(session: str) -> ChatOpenAI:
    """Return a model that learns in a session."""
    return ChatOpenAI(
        model=served.id,
        base_url=f"{url}/v1",
        api_key=SecretStr(key),
        extra_body={"session": session},
        max_completion_tokens=40,
        **(served.model_extra or {})["sampling"],  # temperature and penalty that suit the model
    )


prompt = ChatPromptTemplate.from_messages([("system", "Answer in one sentence."), ("human", "{question}")])
chain = prompt | model_of("langchain") | StrOutputParser()
print(chain.invoke({"question": "My cat is called Miso. Where might she sleep?"}))
for piece in chain.stream({"question": "What is my cat called?"}):
    print(piece, end="", flush=True)
print()
