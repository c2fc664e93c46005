from tests.typecheck import typechecker as typechecker
